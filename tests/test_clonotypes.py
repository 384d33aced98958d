"""Clones from receptors: scirpy as the oracle, barcodes as they come, and a report that adds up."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carvae.data.clonotypes import ALONE, JOINED, PAIRED, Clonotypes, find_clones, group_receptors, own_clones
from carvae.data.contigs import beside
from carvae.errors import ConfigError, ReadError
from carvae.section_patient import ClonesConfig

scirpy = pytest.importorskip("scirpy", reason="needs scirpy (pip install 'carvae[tcr]')")

BASES = "ACGT"
CODON = dict(zip("ASLRGYEQTN", "GCT AGC CTG CGT GGC TAC GAG CAG ACC AAC".split(), strict=True))
OTHER_CODON = {"A": "GCC"}


def barcode(number: int) -> str:
    return "".join(BASES[(number >> (2 * i)) & 3] for i in range(16)) + "-1"


def nt(amino: str, silent: bool = False) -> str:
    return "TGT" + "".join((OTHER_CODON if silent else {}).get(a, CODON[a]) for a in amino) + "TTC"


def contigs(cells: Mapping[str, Sequence[tuple[str, str]]], umis: Mapping[str, int] | None = None) -> pd.DataFrame:
    """10x's table: for each barcode its chains as (locus, amino acids between C and F; "!" for a silent change)."""
    rows = []
    for cell, chains in cells.items():
        for number, (locus, amino) in enumerate(chains):
            plain = amino.rstrip("!")
            rows.append(
                {
                    "barcode": cell,
                    "is_cell": True,
                    "contig_id": f"{cell}_contig_{number}",
                    "high_confidence": True,
                    "length": 500,
                    "chain": locus,
                    "v_gene": f"{locus}V1",
                    "d_gene": "",
                    "j_gene": f"{locus}J1",
                    "c_gene": f"{locus}C",
                    "full_length": True,
                    "productive": True,
                    "cdr3": f"C{plain}F",
                    "cdr3_nt": nt(plain, amino.endswith("!")),
                    "reads": 100,
                    "umis": 10 - number if umis is None else umis[amino],
                    "raw_clonotype_id": "clonotype1",
                    "raw_consensus_id": "",
                }
            )
    return pd.DataFrame(rows)


def found_in(
    path: Path, names: Sequence[str], sample: Sequence[str], patient: Sequence[str], **given_: object
) -> Clonotypes:
    arrays = (np.array(values, dtype=object) for values in (names, sample, patient))
    return find_clones(path, *arrays, ClonesConfig(**given_))


A, B, C, D = (barcode(i) for i in (1, 2, 3, 4))
CELLS = {
    A: [("TRA", "AAS"), ("TRB", "ASL")],
    B: [("TRB", "ASL")],
    C: [("TRA", "AAS")],
    D: [("TRA", "ARG"), ("TRA", "AAS"), ("TRB", "ASL")],
    barcode(5): [("TRA", "AYE"), ("TRB", "AQT")],
    barcode(6): [("TRA", "AYE!"), ("TRB", "AQT")],
    barcode(7): [("TRB", "ANN")],
    barcode(8): [("TRB", "AQT")],
    barcode(9): [("TRG", "AEE"), ("TRD", "AGG")],
    barcode(10): [("TRG", "AEE"), ("TRB", "ASL")],
    barcode(11): [("TRA", "AEE"), ("TRA", "AGG"), ("TRA", "ATT"), ("TRB", "ASL")],
    barcode(12): [("IGH", "AEE"), ("IGK", "ATT")],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s1") / "filtered_contig_annotations.csv"
    contigs(CELLS).to_csv(path, index=False)
    return path


def test_each_rule_on_a_cell_of_its_own(file: Path) -> None:
    names = [*CELLS, barcode(99)]
    clones = found_in(file, names, ["s1"] * 13, ["p"] * 13)
    clone = dict(zip(names, clones.code_N, strict=True))
    assert clone[A] == clone[D], "they share beta and one alpha"
    assert clone[B] == clone[C] == clone[A], "the only clone that has the chain"
    assert clone[barcode(5)] != clone[barcode(6)], "another nucleotide"
    assert clone[barcode(8)] == -1, "two clones have its beta"
    assert clone[barcode(7)] >= 0
    assert clone[barcode(9)] >= 0, "gamma-delta"
    assert [clone[barcode(i)] for i in (10, 11, 12, 99)] == [-1] * 4, "mixed, too many chains, B cell, no receptor"
    report = clones.report
    assert report is not None
    assert (report.n_paired, report.n_joined, report.n_alone) == (5, 2, 1)
    assert (report.n_ambiguous, report.n_multichain, report.n_other, report.n_gamma_delta) == (1, 1, 2, 1)
    assert report.n_receptor == 12 == 5 + 2 + 1 + 1 + 1 + 2
    assert clones.size_N().tolist()[:4] == [4] * 4
    assert clones.size_N()[-1] == 0
    for words in ("8 of 13 cells are in 5 clones of 1 patient(s)", "1 of them are gamma-delta", "4 with a receptor"):
        assert words in report.sentence(), report.sentence()
    columns = clones.columns()
    assert isinstance(columns["clone_id"], pd.Categorical)
    assert str(columns["clone_id"][0]).startswith("p_CARGF_CASLF_"), "of two as common, the first"
    assert pd.isna(columns["clone_id"][-1])


def test_amino_acids_and_beta_alone_by_choice(file: Path) -> None:
    names = list(CELLS)
    by_aa = found_in(file, names, ["s"] * 12, ["p"] * 12, sequence="aa")
    assert by_aa.code_N[4] == by_aa.code_N[5] == by_aa.code_N[7]
    assert by_aa.columns()["clone_id"][4] == "p_CAYEF_CAQTF"
    by_beta = found_in(file, names, ["s"] * 12, ["p"] * 12, chains="beta")
    assert by_beta.code_N[4] == by_beta.code_N[5] == by_beta.code_N[7]
    assert by_beta.code_N[2] == -1, "no beta"
    assert by_beta.code_N[0] == by_beta.code_N[1] == by_beta.code_N[3]


def test_clones_are_told_within_the_patient(tmp_path: Path) -> None:
    for sample in ("s1", "s2", "s3"):
        (tmp_path / sample).mkdir()
        contigs({A: CELLS[A], B: CELLS[barcode(5)]}).to_csv(
            tmp_path / sample / "filtered_contig_annotations.csv", index=False
        )
    names = [f"{s}_{cell}" for s in ("s1", "s2", "s3") for cell in (A, B)]
    clones = found_in(tmp_path, names, np.repeat(["s1", "s2", "s3"], 2), np.repeat(["p", "p", "q"], 2))
    code = clones.code_N
    assert code[0] == code[2] != code[4], "the same receptor in another patient is another clone"
    assert len(clones.names) == 4
    assert set(clones.patients) == {"p", "q"}
    assert clones.report is not None
    assert [match.sample for match in clones.report.files] == ["s1", "s2", "s3"]


CHAIN = st.sampled_from(["AAA", "AAS", "AAL", "AAR", "AAG"])


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from("pq"), CHAIN, CHAIN), min_size=1, max_size=25))
def test_single_pairs_are_grouped_as_scirpy_does(pairs: list[tuple[str, str, str]]) -> None:
    from_scirpy: ad.AnnData
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = []
        for i, (_, alpha, beta) in enumerate(pairs):
            cell = scirpy.io.AirrCell(f"c{i}")
            for locus, amino in (("TRA", alpha), ("TRB", beta)):
                chain = scirpy.io.AirrCell.empty_chain_dict()
                chain |= {"locus": locus, "junction": nt(amino), "junction_aa": f"C{amino}F", "productive": True}
                cell.add_chain(chain)
            cells.append(cell)
        from_scirpy = scirpy.io.from_airr_cells(cells)
        from_scirpy.obs["patient"] = [patient for patient, _, _ in pairs]
        scirpy.pp.index_chains(from_scirpy)
        scirpy.pp.ir_dist(from_scirpy, metric="identity", sequence="nt")
        scirpy.tl.define_clonotypes(from_scirpy, within_group="patient", n_jobs=1)
    names = np.array([f"c{i}" for i in range(len(pairs))], dtype=object)
    patient = np.array([patient for patient, _, _ in pairs], dtype=object)
    own = find_clones(from_scirpy, names, patient, patient, ClonesConfig())
    both = set(zip(own.code_N, from_scirpy.obs["clone_id"].astype(str), strict=True))
    assert len(both) == len({a for a, _ in both}) == len({b for _, b in both})


@given(st.lists(st.tuples(st.integers(0, 1), *[st.sampled_from(["", "x", "y", "z"])] * 3), min_size=1, max_size=20))
def test_grouping_depends_on_no_order_and_says_how_each_cell_came(cells: list[tuple[int, str, str, str]]) -> None:
    def grouped(rows: Sequence[tuple[int, str, str, str]]) -> tuple[np.ndarray, np.ndarray]:
        scope, first, second, beta = (np.array(column, dtype=object) for column in zip(*rows, strict=True))
        second = np.where(first == "", "", second)  # a second chain follows a first
        return group_receptors(scope.astype(int), first, second, beta)

    group, how = grouped(cells)
    again, how_again = grouped(cells[::-1])
    assert len({*zip(group, again[::-1], strict=True)}) == len(set(group)), "the same groups"
    assert (how == how_again[::-1]).all()
    assert ((group >= 0) == (how >= 0)).all()
    for number, (_, alpha, _, beta) in enumerate(cells):
        if alpha and beta:
            assert how[number] == PAIRED
        elif alpha or beta:
            assert how[number] in (JOINED, ALONE, -1)
        else:
            assert group[number] == -1
    scopes = pd.DataFrame({"group": group, "scope": [cell[0] for cell in cells]})[group >= 0]
    assert (scopes.groupby("group")["scope"].nunique() == 1).all()


@pytest.mark.parametrize(
    "names",
    [
        [A, B],  # as they are
        [A.removesuffix("-1"), B.removesuffix("-1")],
        [f"s1_{A}", f"s1_{B}"],
        [f"{A}-0", f"{B}-0"],  # as anndata.concat makes them
        [f"{A}_s1", f"{B}_s1"],
        [A.replace("-1", "-3"), B.replace("-1", "-3")],  # a lane of cellranger aggr
    ],
)
def test_barcodes_are_met_however_they_were_renamed(file: Path, names: list[str]) -> None:
    clones = found_in(file, names, ["other"] * 2, ["p"] * 2)
    assert clones.code_N.tolist() == [0, 0]
    assert clones.report is not None
    assert clones.report.files[0].n_matched == 2


def test_a_barcode_in_several_samples_is_left_out_and_told(file: Path, tmp_path: Path) -> None:
    names, samples = [f"a_{A}", f"b_{A}", f"a_{B}"], ["a", "b", "a"]
    clones = found_in(file, names, samples, ["p"] * 3)
    assert clones.code_N.tolist() == [-1, -1, 0]
    assert clones.report is not None
    assert "1 are in several samples and are left out" in clones.report.files[0].sentence()
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / file.name).write_bytes(file.read_bytes())
    assert found_in(tmp_path, names, samples, ["p"] * 3).code_N.tolist() == [-1, 0, -1], "the folder names the sample"
    with pytest.raises(ReadError, match=r"1 barcodes of .* are in several samples"):
        found_in(file, names[:2], samples[:2], ["p"] * 2)


def test_barcodes_that_other_samples_have_by_chance_are_no_match(tmp_path: Path) -> None:
    path = tmp_path / "filtered_contig_annotations.csv"
    contigs({barcode(i): CELLS[A] for i in range(60)}).to_csv(path, index=False)
    names = [f"x_{barcode(i)}" for i in range(58, 158)]
    with pytest.raises(ReadError, match=r"no barcode of .* is a cell of the query"):
        found_in(path, names, ["x"] * 100, ["p"] * 100)
    assert (found_in(path, names[:4], ["x"] * 4, ["p"] * 4).code_N >= 0).sum() == 2, "half of few cells is no chance"


def test_a_file_without_a_name_is_of_the_sample_that_has_its_barcodes(tmp_path: Path) -> None:
    path = tmp_path / "all.airr.tsv"
    own = {barcode(i): [("TRA", "AAS"), ("TRB", "ASL")] for i in range(20)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contigs(own).to_csv(tmp_path / "filtered_contig_annotations.csv", index=False)
        scirpy.io.write_airr(scirpy.io.read_10x_vdj(tmp_path / "filtered_contig_annotations.csv"), path)
    names = [f"a_{barcode(i)}" for i in range(20)] + [f"b_{barcode(i)}" for i in range(18, 60)]
    clones = found_in(path, names, ["a"] * 20 + ["b"] * 42, ["p"] * 62)
    assert (clones.code_N[:20] >= 0).all(), "two of them are in the other sample as well"
    assert (clones.code_N[20:] < 0).all()
    assert clones.report is not None
    assert clones.report.files[0].sample == "a"


def test_alpha_beta_and_gamma_delta_libraries_of_one_sample(tmp_path: Path) -> None:
    for name, cells in (
        ("vdj_t", {A: CELLS[A], B: CELLS[B]}),
        ("vdj_t_gd", {A: [("TRG", "AEE")], B: CELLS[barcode(9)], C: CELLS[barcode(9)]}),
    ):
        (tmp_path / name).mkdir()
        contigs(cells).to_csv(tmp_path / name / "filtered_contig_annotations.csv", index=False)
    clones = found_in(tmp_path, [A, B, C], ["s"] * 3, ["p"] * 3)
    assert "gd:" not in clones.columns()["clone_id"][0], "the complete pair"
    assert clones.code_N[1] == clones.code_N[2]
    assert "gd:" in clones.columns()["clone_id"][2]


def test_an_airr_table_and_a_scirpy_file_give_the_same_clones(file: Path, tmp_path: Path) -> None:
    names = list(CELLS)
    expected = found_in(file, names, ["s"] * 12, ["p"] * 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = scirpy.io.read_10x_vdj(file)
        scirpy.io.write_airr(adata, tmp_path / "cells.airr.tsv")
        adata.write_h5ad(tmp_path / "scirpy.h5ad")
        __import__("mudata").MuData({"airr": adata}).write(tmp_path / "scirpy.h5mu")
    for source in (*(tmp_path / name for name in ("cells.airr.tsv", "scirpy.h5ad", "scirpy.h5mu")), adata):
        clones = found_in(source, names, ["s"] * 12, ["p"] * 12)
        assert clones.names == expected.names
        assert clones.code_N.tolist() == expected.code_N.tolist()


def test_contigs_beside_a_10x_matrix_are_found(tmp_path: Path) -> None:
    outs = tmp_path / "per_sample_outs" / "s1"
    for place in ("count/sample_filtered_feature_bc_matrix.h5", "vdj_t/filtered_contig_annotations.csv"):
        (outs / place).parent.mkdir(parents=True, exist_ok=True)
        (outs / place).touch()
    contig = outs / "vdj_t" / "filtered_contig_annotations.csv"
    assert beside(outs / "count" / "sample_filtered_feature_bc_matrix.h5") == [contig]
    assert beside(tmp_path / "per_sample_outs") == beside(outs) == [contig]
    assert beside(tmp_path / "query.h5ad") == beside(tmp_path / "nowhere") == []


def test_what_cannot_be_used_is_said_in_one_sentence(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, names: Sequence[str] = (A,)) -> str:
        with pytest.raises((ReadError, ConfigError)) as error:
            found_in(path, names, ["s"] * len(names), ["p"] * len(names))
        assert "\n" not in str(error.value)
        return str(error.value)

    wrong, empty = tmp_path / "wrong.csv", tmp_path / "none.tsv"
    pd.DataFrame({"barcode": [A], "gene": ["CD4"]}).to_csv(wrong, index=False)
    empty.write_text("")
    (tmp_path / "folder").mkdir()
    assert "does not exist" in refused(tmp_path / "nowhere.csv")
    assert "lacks the columns chain, cdr3, cdr3_nt, productive; it has barcode, gene" in refused(wrong)
    saved = tmp_path / "saved.csv"
    contigs({A: CELLS[A]}).to_csv(saved, index=False, sep=";")
    assert "parts its columns by semicolons, not by commas; give the file as it was exported" in refused(saved)
    assert "cannot be read as receptor data" in refused(empty)
    assert "holds no filtered_contig_annotations.csv" in refused(tmp_path / "folder")
    assert re.search("theirs look like '[ACGT]{16}-1', the query's like 'x-1'", refused(file, ["x-1"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.AnnData(np.ones((1, 1)), obs=pd.DataFrame(index=[A])).write_h5ad(tmp_path / "plain.h5ad")
    assert 'has no obsm["airr"], so it is no file of scirpy' in refused(tmp_path / "plain.h5ad")
    (tmp_path / "x.rds").touch()
    assert "is no receptor data that carvae reads" in refused(tmp_path / "x.rds")
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
    contigs({A: CELLS[A]}).to_csv(tmp_path / "two/a/filtered_contig_annotations.csv", index=False)
    contigs({A: CELLS[barcode(5)]}).to_csv(tmp_path / "two/b/filtered_contig_annotations.csv", index=False)
    assert "1 cells have different receptors" in refused(tmp_path / "two")
    monkeypatch.setitem(__import__("sys").modules, "scirpy", None)
    assert "not installed; pip install 'carvae[tcr]'" in refused(file)


def test_a_column_of_the_query_is_taken_within_the_patient() -> None:
    column = pd.Series(["c1", "c1", "c2", "", None, "nan", " c2 "], dtype="string")
    clones = own_clones(column, np.array(["p", "q", "p", "p", "p", "q", "p"], dtype=object))
    assert clones.code_N.tolist() == [1, 2, 0, -1, -1, -1, 0]
    assert clones.names == ("c2", "p_c1", "q_c1")
    assert list(clones.patients) == ["p", "p", "q"]
    assert clones.size_N().tolist() == [1, 1, 2, 0, 0, 0, 2]
