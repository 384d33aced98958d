from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from carvae.data.gene_policy import CELL_CYCLE
from carvae.data.gene_table import TABLES
from carvae.data.genes import (
    POLICY_GROUPS,
    TRANSGENES,
    GeneReceipt,
    GeneTable,
    align,
    excluded_by_policy,
    is_transgene,
    looks_like_mouse,
    mouse_genes_beside_human,
)
from carvae.errors import GeneError

CARPALL = Path(__file__).parents[2] / "shared" / "data" / "carpall_cart.h5ad"

HEAD = "hgnc_id\tsymbol\tstatus\tprev_symbol\talias_symbol\tensembl_gene_id\n"
HGNC = HEAD + (
    'HGNC:1\tGENEA\tApproved\t"OLDA|SHARED"\tGENEB\tENSG00000000001\n'
    "HGNC:2\tGENEB\tApproved\t\tSHARED\tENSG00000000002\n"
    "HGNC:3\tC1orf9\tApproved\t\tTim-9\t\n"
    "HGNC:4\tGONE\tEntry Withdrawn\t\tGHOST\tENSG00000000004\n"
)


@pytest.fixture(scope="module")
def table() -> GeneTable:
    return GeneTable.default()


def resolved(table: GeneTable, *names: str, ids: list[str] | None = None) -> list[tuple[str, str]]:
    genes = table.resolve(list(names), ids)
    return list(zip(genes.symbols, genes.how, strict=True))


# --- the packaged table


def test_the_packaged_table_is_sound_and_small(table: GeneTable) -> None:
    path = TABLES / "hgnc.tsv.gz"
    assert path.stat().st_size < 700_000
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert lines[0].split("\t") == ["symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol"]
    assert len(lines) - 1 == len(table.symbols) > 40_000
    assert all(re.fullmatch(r"ENSG\d{11}", gene_id) for gene_id in table.by_id)
    assert len(set(table.by_id.values())) == len(table.by_id) > 39_000
    assert not table.symbols & (table.aliases.keys() | table.ambiguous.keys())
    assert not table.aliases.keys() & table.ambiguous.keys()
    assert set(table.aliases.values()) <= table.symbols


def test_every_decided_name_says_something_that_the_table_then_does(table: GeneTable) -> None:
    for line in (TABLES / "decided_names.tsv").read_text().splitlines()[1:]:
        name, genes = line.split("\t")
        wanted = genes.split("|")
        assert table.symbols.issuperset(wanted), name
        if len(wanted) == 1:
            assert resolved(table, name) == [(wanted[0], "alias")]
        else:
            assert resolved(table, name) == [(name, "ambiguous")]


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("PD1", "PDCD1"),
        ("PD-1", "PDCD1"),
        ("CD279", "PDCD1"),
        ("TIM3", "HAVCR2"),
        ("TIM-3", "HAVCR2"),
        ("LAG-3", "LAG3"),
        ("IL8", "CXCL8"),
        ("4-1BB", "TNFRSF9"),
        ("FAM46C", "TENT5C"),
        ("MARCH1", "MARCHF1"),
        ("SEPT2", "SEPTIN2"),
        ("SARS", "SARS1"),
        ("HLA.DRA", "HLA-DRA"),
        ("NKX2.1", "NKX2-1"),
        ("C1ORF21", "C1orf21"),
        ("GRCh38_CD3E", "CD3E"),
        ("MATR3-1", "MATR3"),
        ("MATR3.1", "MATR3"),
        ("TRAV29/DV5", "TRAV29DV5"),
    ],
)
def test_other_names_give_the_approved_symbol(table: GeneTable, name: str, symbol: str) -> None:
    assert resolved(table, name) == [(symbol, "alias")]


@pytest.mark.parametrize(
    "name", ["ENSG00000198851", "ENSG00000198851.15", "CD3E_ENSG00000198851", "GRCh38_ENSG00000198851"]
)
def test_ensembl_ids_are_known_with_and_without_version(table: GeneTable, name: str) -> None:
    assert resolved(table, name) == [("CD3E", "ensembl")]


def test_an_unknown_id_loses_its_version_and_leaves_the_word_to_the_name(table: GeneTable) -> None:
    assert resolved(table, "ENSG00000999999.3") == [("ENSG00000999999", "unknown")]
    assert resolved(table, "PD-1", ids=["ENSG00000999999"]) == [("PDCD1", "alias")]
    assert resolved(table, "CAT_scFv", ids=["CAT_scFv"]) == [("CAT_scFv", "unknown")]


@pytest.mark.parametrize("no_id", [float("nan"), None, "", 7])
def test_values_that_are_no_ids_are_passed_over(table: GeneTable, no_id: object) -> None:
    assert resolved(table, "CD3E", ids=[no_id]) == [("CD3E", "symbol")]  # type: ignore[list-item]


def test_ids_beat_symbols(table: GeneTable) -> None:
    assert resolved(table, "CD4", "CAR", ids=["ENSG00000198851", "ENSG00000154639"]) == [
        ("CD3E", "ensembl"),
        ("CXADR", "ensembl"),
    ]
    assert resolved(table, "ENSG00000153563", ids=["ENSG00000198851.4"]) == [("CD3E", "ensembl")]


def test_unknown_names_stay_as_they_are(table: GeneTable) -> None:
    names = ["AC012345.6", "RP11-34P13.7", "notagene", "Cd3e", "IL-999", "AC012345.6-1"]
    assert resolved(table, *names) == [(name, "unknown") for name in names]


def test_a_numbered_alias_needs_its_base_beside_it(table: GeneTable) -> None:
    assert resolved(table, "IL8", "IL8-1") == [("CXCL8", "alias"), ("CXCL8", "alias")]
    assert resolved(table, "IL8-1") == [("IL8-1", "unknown")]
    assert resolved(table, "IL-2") == [("IL2", "alias")]


def test_a_transgene_is_never_the_human_gene_that_bears_its_name(table: GeneTable) -> None:
    for name in TRANSGENES:
        assert resolved(table, name) == [(name, "unknown")]
    assert "CAR" in table.ambiguous
    assert table.aliases["CART"] == "CARTPT"


def test_approved_symbols_win_and_shared_names_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "hgnc_complete_set.txt"
    path.write_text(HGNC)
    small = GeneTable.read(path)
    assert resolved(small, "GENEA", "GENEB", "OLDA", "SHARED", "TIM-9", "C1ORF9", "GONE", "GHOST") == [
        ("GENEA", "symbol"),
        ("GENEB", "symbol"),
        ("GENEA", "alias"),
        ("SHARED", "ambiguous"),
        ("C1orf9", "alias"),
        ("C1orf9", "alias"),
        ("GONE", "unknown"),
        ("GHOST", "unknown"),
    ]
    assert resolved(small, "ENSG00000000004.2") == [("ENSG00000000004", "unknown")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("symbol\tprev_symbol\n", "no column ensembl_gene_id, alias_symbol"),
        (HGNC + "HGNC:5\tCUT", "cut off in line 6"),
        ("\x1f\x8b\x08", "cannot be read"),
        ("", "no column"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "table.tsv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(GeneError, match=problem):
        GeneTable.read(path)
    with pytest.raises(GeneError, match="cannot be read"):
        GeneTable.read(tmp_path / "absent.tsv")


def test_ids_of_another_length_are_refused(table: GeneTable) -> None:
    with pytest.raises(GeneError, match="2 gene names but 1 gene ids"):
        table.resolve(["CD4", "CD8A"], ["ENSG00000198851"])


# --- properties of resolve and align

NAMES = [
    "CD3E", "ENSG00000198851.2", "PD1", "PDCD1", "PDCD1-1", "CD8", "TCF1", "SHARED_X", "AC012345.6", "LAG3", "CD223",
    "CAR", "GZMB", "ENSG00000100453", "HLA.A", "HLA-A",
]  # fmt: skip
PANEL = ["CD3E", "PDCD1", "LAG3", "GZMB", "HLA-A", "AC012345.6", "TOX"]


@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_permuting_columns_permutes_what_they_are(names: list[str], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(names))
    table = GeneTable.default()
    straight, mixed = table.resolve(names, None), table.resolve([names[i] for i in order], None)
    assert list(straight.symbols[order]) == list(mixed.symbols)
    assert list(straight.how[order]) == list(mixed.how)


@settings(deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), max_size=20).map(lambda some: ["CD3E", *some]), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_counts_are_summed_by_gene_and_none_is_lost(dtype: type, names: list[str], seed: int) -> None:
    genes = GeneTable.default().resolve(names, None)
    alignment = align(genes, PANEL)
    counts = sparse.csr_matrix(np.random.default_rng(seed).integers(0, 70_000, (4, len(names))).astype(dtype))
    aligned = alignment.apply(counts)
    assert aligned.dtype == dtype
    assert aligned.shape == (4, len(PANEL))
    for column, symbol in enumerate(PANEL):
        expected = counts.toarray()[:, genes.symbols == symbol].sum(axis=1)
        np.testing.assert_array_equal(aligned.toarray()[:, column], expected)
        assert alignment.present[column] == (symbol in genes.symbols)
    used = np.isin(genes.symbols, PANEL)
    assert aligned.sum(dtype=np.float64) == counts[:, used].sum(dtype=np.float64)
    receipt = alignment.receipt
    assert receipt.matched + len(receipt.missing) == receipt.n_panel == len(PANEL)
    assert receipt.duplicated == [s for s in PANEL if (genes.symbols == s).sum() > 1]


@given(name=st.sampled_from(sorted(GeneTable.default().ambiguous)), beside=st.lists(st.sampled_from(NAMES), max_size=5))
def test_ambiguous_names_are_never_resolved(name: str, beside: list[str]) -> None:
    genes = GeneTable.default().resolve([*beside, name], None)
    assert genes.symbols[-1] == name
    assert genes.how[-1] == ("unknown" if is_transgene(name) else "ambiguous")


@given(name=st.text(max_size=30))
def test_any_text_is_a_name(name: str) -> None:
    genes = GeneTable.default().resolve([name], [name])
    assert genes.how[0] in {"symbol", "ensembl", "alias", "unknown", "ambiguous"}
    if genes.how[0] == "unknown" and "ENSG" not in name:
        assert genes.symbols[0] == name.strip()


def test_the_receipt_says_what_happened(table: GeneTable) -> None:
    genes = table.resolve(["CD3E", "CD3E-1", "PD-1", "CD8", "ENSG00000089692.9", "IL8", "IL8x"], None)
    receipt = align(genes, ["LAG3", "CD3E", "PDCD1", "TOX"]).receipt
    assert receipt == GeneReceipt(
        n_panel=4,
        matched=3,
        aliased=["CD3E-1->CD3E", "PD-1->PDCD1"],
        missing=["TOX"],
        ambiguous=["CD8"],
        duplicated=["CD3E"],
        overlap=0.75,
    )
    assert receipt.to_dict()["aliased"] == ["CD3E-1->CD3E", "PD-1->PDCD1"]
    assert receipt.sentence() == (
        "3 of 4 genes found (75.0%); 2 by another name (CD3E-1->CD3E, PD-1->PDCD1); "
        "1 summed from several columns (CD3E); 1 missing (TOX); 1 ambiguous and left alone (CD8)"
    )


def test_two_studies_that_share_an_unlisted_name_match_on_it(table: GeneTable) -> None:
    panel = list(table.resolve(["CAT_scFv", "AL391244.2", "CD8"], None).symbols)
    assert align(table.resolve(["CD8", "AL391244.2", "CAT_scFv"], None), panel).present.all()


# --- what is refused

PANEL_HUMAN = ["CD3E", "CD8A", "LAG3", "TOX", "GZMB", "SELL"]


MOUSE = "they look like mouse genes ({}), and the panel is human; convert them to their human orthologues"
CASE = (
    "they are human symbols in another case; write them in capitals if the cells are human "
    "(adata.var_names.str.upper()), or convert them to human orthologues if not (found: {})"
)
BARCODES = (
    "the gene names are cell barcodes; rows and columns are swapped, so transpose the matrix (adata.T) (found: {})"
)
NUMBERS = "the gene names are bare numbers; set var_names to gene symbols or Ensembl ids (ENSG...) (found: {})"
TRANSCRIPTS = "they are Ensembl transcripts; sum the counts by gene (ENSG...) first (found: {})"
SPECIES = "they are Ensembl ids of another species; convert them to human orthologues (found: {})"
NOTHING = "the columns must be human genes by HGNC symbol or Ensembl id (found: {})"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["Cd3e", "Cd8a", "Lag3", "Tox", "Gm1000"], MOUSE.format("Cd3e, Cd8a, Lag3, ...")),
        ([f"ENSMUSG0000000{n}" for n in (1, 2, 3)], MOUSE.format("ENSMUSG00000001, ENSMUSG00000002, ENSMUSG00000003")),
        (["cd3e", "cd8a", "lag3"], CASE.format("cd3e, cd8a, lag3")),
        (["AAACCTGAGAAACCAT-1", "TTTGTCATCTTTAGGG-1"], BARCODES.format("AAACCTGAGAAACCAT-1, TTTGTCATCTTTAGGG-1")),
        ([str(n) for n in range(50)], NUMBERS.format("0, 1, 2, ...")),
        (["1", "2", "foo"], NUMBERS.format("1, 2, foo")),
        (["1", "2", "foo", "bar"], NOTHING.format("1, 2, foo, ...")),  # a half is no majority
        (["1", "2", "foo", "bar", "baz"], NOTHING.format("1, 2, foo, ...")),
        (["ENST00000361739.3", "ENST00000361740"], TRANSCRIPTS.format("ENST00000361739.3, ENST00000361740")),
        (["ENSDARG00000000001", "ENSDARG00000000002"], SPECIES.format("ENSDARG00000000001, ENSDARG00000000002")),
        (["ENSG99999999991", "ENSG99999999992"], NOTHING.format("ENSG99999999991, ENSG99999999992")),
        (["foo", "bar", "baz", "qux"], NOTHING.format("foo, bar, baz, ...")),
        ([], "the query has no genes"),
    ],
)
def test_genes_that_cannot_match_are_refused_with_the_remedy(table: GeneTable, names: list[str], problem: str) -> None:
    with pytest.raises(GeneError) as caught:
        align(table.resolve(names, None), PANEL_HUMAN)
    assert str(caught.value) == f"only 0 of the 6 genes wanted are among the query's {len(names)} genes: {problem}"


def test_two_species_side_by_side_are_counted(table: GeneTable) -> None:
    def count(*names: str) -> int:
        return mouse_genes_beside_human(table.resolve(list(names), None))

    human = ["CD3E", "CD8A", "LAG3", "TOX", "SELL", "GZMB", "CCR7", "IL7R", "TCF7"]
    assert count(*human) == 0
    assert count("Cd3e", "Cd8a") == 0  # of one species alone there is nothing to be told
    assert count(*human, "Cd3e", "ENSMUSG00000000001") == 2
    assert count(*human, "Cd3e") == 0  # a tenth is few
    assert count("CD4", *["Cd3e", "Cd8a", "Lag3", "Tox", "Sell", "Gzmb", "Ccr7", "Il7r", "Tcf7"]) == 0  # so here
    assert count(*human, "Foo", "Bar", "Baz") == 0  # no mouse genes by their look alone


def test_ids_that_were_moved_against_the_names_are_refused(table: GeneTable) -> None:
    ids = ["ENSG00000198851", "ENSG00000153563", "ENSG00000089692", "ENSG00000198846"]
    names = ["CD3E", "CD8A", "LAG3", "TOX"]
    assert align(table.resolve(names, ids), names).receipt.matched == 4
    with pytest.raises(GeneError, match=r"4 of 4 genes .* such as 'CD3E' with the id of CD8A; names and ids were not"):
        align(table.resolve(names, ids[1:] + ids[:1]), names)
    many = sorted(table.symbols)[:100]  # a few symbols that were given anew are no reason
    assert align(table.resolve([*names[:2], *many], [ids[0], ids[2], *[""] * 100]), names).receipt.matched == 2


def test_a_matrix_of_the_panels_own_columns_is_handed_back(table: GeneTable) -> None:
    counts = sparse.csr_matrix(np.arange(6).reshape(2, 3))
    assert align(table.resolve(["CD3E", "CD8A", "LAG3"], None), ["CD3E", "CD8A", "LAG3"]).apply(counts) is counts
    other = align(table.resolve(["CD3E", "CD8A", "LAG3"], None), ["CD8A", "CD3E", "LAG3"]).apply(counts)
    np.testing.assert_array_equal(other.toarray(), [[1, 0, 2], [4, 3, 5]])


def test_a_few_chance_matches_do_not_make_mouse_human(table: GeneTable) -> None:
    names = ["Cd3e", "Cd8a", "Lag3", "Tox", "Sell", "GZMB"]
    with pytest.raises(GeneError, match=r"only 1 of the 6.*mouse"):
        align(table.resolve(names, None), PANEL_HUMAN)


def test_a_small_targeted_query_is_not_refused_for_a_large_panel(table: GeneTable) -> None:
    panel = sorted(table.symbols)[-5_000:]
    assert align(table.resolve(["ZAP70", "XIST"], None), panel).receipt.matched == 2


def test_a_panel_that_repeats_a_gene_is_refused(table: GeneTable) -> None:
    with pytest.raises(GeneError, match=r"more than once \(CD4\)"):
        align(table.resolve(["CD4"], None), ["CD4", "LAG3", "CD4"])


@pytest.mark.parametrize(
    ("names", "mouse"),
    [
        (["Cd3e", "Trac", "mt-Nd1", "H2-K1", "0610009B22Rik", "Gm1992"], True),
        (["ENSMUSG00000032093.7"], True),
        (["CD3E", "TRAC", "MT-ND1", "C1orf112", "Metazoa_SRP"], False),
        (["Gene1", "Gene2", "Gene_3"], False),
        (["ENSG00000198851"], False),
        ([], False),
        (["Cd3e", "Trac", "Lag3", "CD4", "TOX", "SELL"], False),  # as many as not is no majority
        (["Cd3e", "Trac", "Lag3", "Tox", "CD4", "SELL"], True),
    ],
)
def test_looks_like_mouse(names: list[str], mouse: bool) -> None:
    assert looks_like_mouse(names) is mouse


# --- gene policy


def test_transgenes_are_known_in_any_case_and_no_human_gene_is_one(table: GeneTable) -> None:
    for name in [
        *TRANSGENES,
        "cat-scfv",
        "CAT.scFv",
        "fmc63_28z",
        "YESCARTA",
        "anti-CD22-CAR",
        "CD19scFv-BBz",
        "WPRE_2",
    ]:
        assert is_transgene(name), name
        assert is_transgene(name.swapcase()), name
    assert [name for name in table.symbols if is_transgene(name)] == []


def test_vdj_is_the_segments_and_never_a_constant_gene() -> None:
    segments = ["TRAV1-1", "TRAJ10", "TRBV20-1", "TRBD1", "TRBJ2-7", "TRGV9", "TRGJP1", "TRDV2", "TRDJ1", "TRDD3"]
    segments += ["TRAV29DV5", "IGHV3-23", "IGHJ4", "IGHD1-1", "IGKV1-5", "IGLJ2", "TRGVA", "IGHVII-1-1"]
    kept = [
        "TRAC",
        "TRBC1",
        "TRBC2",
        "TRDC",
        "TRGC1",
        "TRGC2",
        "IGHM",
        "IGHD",
        "IGHG1",
        "IGKC",
        "IGLC2",
        "TRADD",
        "TRDN",
    ]
    kept += ["IGHMBP2", "IGLL5", "TRAT1", "TRAF1"]
    assert list(excluded_by_policy([*segments, *kept], ["vdj"])["vdj"]) == [True] * len(segments) + [False] * len(kept)


@pytest.mark.parametrize(
    ("group", "members", "others"),
    [
        ("mitochondrial", ["MT-ND1", "MT-RNR2"], ["MTOR", "MT1X"]),
        (
            "ribosomal",
            ["RPL13A", "RPS4Y1", "RPLP0", "RPSA", "RPS27A", "RPL36AL", "UBA52", "RPL7P9"],
            ["RPS6KA1", "MRPL12", "RPS19BP1", "RPL36A-HNRNPH2"],
        ),
        (
            "sex",
            ["XIST", "TSIX", "DDX3Y", "UTY", "TTTY14", "CDY1B", "RPS4Y1", "NLGN4Y-AS1"],
            ["DDX3X", "CDYL", "ZFX", "DAZAP1"],
        ),
        ("cell_cycle", ["MKI67", "TOP2A", "PCNA", "CENPU", "PIMREG", "JPT1"], ["CCND2", "TUBA1B"]),
    ],
)
def test_policy_groups(group: str, members: list[str], others: list[str]) -> None:
    assert list(excluded_by_policy([*members, *others], [group])[group]) == [True] * len(members) + [False] * len(
        others
    )


def test_policy_lists_hold_approved_symbols_of_the_published_length(table: GeneTable) -> None:
    assert len(CELL_CYCLE) == 43 + 54
    assert CELL_CYCLE <= table.symbols


def test_policy_masks_follow_the_symbols_and_unknown_groups_are_refused() -> None:
    masks = excluded_by_policy(np.array(["CD4", "CAT_scFv"], object), POLICY_GROUPS)
    assert list(masks) == list(POLICY_GROUPS)
    assert all(mask.dtype == bool and mask.shape == (2,) for mask in masks.values())
    assert masks["transgene"].tolist() == [False, True]
    assert excluded_by_policy([], ["vdj"])["vdj"].shape == (0,)
    with pytest.raises(GeneError, match="no group sexx; choose from transgene"):
        excluded_by_policy(["CD4"], ["sexx"])


# --- real data


@pytest.mark.skipif(not CARPALL.exists(), reason="../shared/data/carpall_cart.h5ad is not on this machine")
def test_carpall_genes_with_a_name_resolve(table: GeneTable) -> None:
    import h5py

    with h5py.File(CARPALL) as file:
        var = file["var"]
        names = [name.decode() for name in var[var.attrs["_index"]][:]]
        ids = [gene_id.decode() for gene_id in var["gene_ids"][:]]
    genes = table.resolve(names, ids)
    clone = re.compile(r"[A-Z]{2,4}\d{5,}\.\d+$")  # names of sequenced clones, for genes without an approved symbol
    named = np.array([clone.match(name) is None for name in names])
    known = genes.how != "unknown"
    assert known[named].mean() > 0.99
    assert known.mean() > 0.81
    for gene in ("PDCD1", "HAVCR2", "LAG3", "TOX", "TCF7", "SARS1", "CAT_scFv"):
        assert gene in genes.symbols
