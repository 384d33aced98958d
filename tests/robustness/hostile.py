"""Hostile files made from bytes, and carvae made to read them: the targets of scripts/fuzz.py and of test_corpus.py.

What is opened must be read or refused by a `CarvaeError` of one sentence; all else is a finding.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp
from choices import Choices, edited_bytes, edited_hdf5, edited_tree
from small import KEPT

from carvae.config import Config, label_file
from carvae.data.contigs import read_receptors
from carvae.data.on_disk import readable_by_others
from carvae.data.readers import open_samples
from carvae.data.schema import inspect_obs
from carvae.data.sheet import read_sheet
from carvae.data.sides import read_side
from carvae.errors import CarvaeError
from carvae.labels.signatures import Signatures
from carvae.labels.tree import LabelTree
from carvae.labels.tree import Mapping as LabelMapping
from carvae.model.bundle import load
from carvae.model.bundle_files import FILES, NO_HASH
from carvae.section_compare import Gate

MOST_MB = 200
"""Memory beyond twice the size of the file that reading it may take."""
MOST_SECONDS = 2
"""Of the processor."""


class Finding(AssertionError):
    """Something was read that should not have been, or took too much."""


def _counts() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.poisson(rng.gamma(0.4, 3.0, (20, 30))).astype(np.int32))


def _anndata() -> ad.AnnData:
    adata = ad.AnnData(_counts())
    adata.var_names = [f"GENE{g}" for g in range(30)]
    adata.var["gene_ids"] = [f"ENSG{g:011}" for g in range(30)]
    adata.obs["sample"] = ["a", "b"] * 10
    adata.obs["patient"] = [f"p{n % 3}" for n in range(20)]
    adata.obs["timepoint_days"] = [0.0, 14.0] * 10
    adata.layers["counts"] = adata.X.toarray()
    adata.raw = adata.copy()
    return adata


def _tenx(path: Path) -> None:
    counts = _counts()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        group["shape"] = np.array([30, 20])
        group["barcodes"] = np.array([f"c{n}" for n in range(20)], "S")
        for key, value in (("name", "G"), ("id", "ENSG0000000000"), ("feature_type", None)):
            names = ["Gene Expression" if value is None else f"{value}{g}" for g in range(30)]
            group[f"features/{key}"] = np.array(names, "S")


class Target:
    """Sources that are whole, the kept inputs to start from, and what is done with an input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        """Inputs to start from."""
        return [bytes([kind]) for kind in range(16)]

    def make(self, choices: Choices, place: Path) -> tuple[Path, Callable[[Path], object]]:
        """A hostile file, and what reads it."""
        raise NotImplementedError

    def run(self, data: bytes, place: Path) -> str:
        """Make and read one input in the empty folder ``place``; what was said. Raises whatever is no CarvaeError."""
        path, read = self.make(Choices(data), place)
        size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        before, began = _peak_mb(), time.process_time()
        try:
            read(path)
            said = "read"
        except CarvaeError as error:
            said = str(error)
            head = said.splitlines()[0] if said.strip() else ""
            if not head or (len(said.splitlines()) > 1 and "problems" not in said):
                raise Finding(f"said {said[:300]!r}") from error
        if (took := time.process_time() - began) > MOST_SECONDS:
            raise Finding(f"reading {size:,} bytes took {took:.1f} s")
        if (more := _peak_mb() - before) > MOST_MB + 2 * size / 2**20:
            raise Finding(f"reading {size:,} bytes took {more:.0f} MB")
        return said


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _read_counts(path: Path) -> None:
    for source in open_samples(path):
        for _ in source.chunks():
            pass
        inspect_obs(source.obs, "mine", {}, {}, require=())


def _read_counts_once(path: Path) -> None:
    """As annotate reads them: checked while they are used."""
    for source in open_samples(path, whole=False):
        blocks = list(source.blocks(8))
        source.confirmed(
            np.concatenate([b.total_N for b in blocks]),
            np.concatenate([b.print_N for b in blocks]),
            max(b.largest for b in blocks),
        )


READS = (_read_counts, _read_counts_once)


class Hdf5(Target):
    """.h5ad and 10x .h5, changed by way of HDF5, or byte by byte."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with readable_by_others():
            _anndata().write_h5ad(folder / "a.h5ad")
            small = _anndata()
            del small.layers["counts"], small.raw
            small.X = small.X.tocsc()
            small.write_h5ad(folder / "packed.h5ad", compression="gzip")
        _tenx(folder / "tenx.h5")
        self.images = [(name, (folder / name).read_bytes()) for name in ("a.h5ad", "packed.h5ad", "tenx.h5")]

    def make(self, choices: Choices, place: Path) -> tuple[Path, Callable[[Path], object]]:
        """A hostile file, and what reads it."""
        how = choices.number()
        name, image = self.images[how % 3]
        (place / name).write_bytes((edited_bytes if how // 3 % 8 == 7 else edited_hdf5)(image, choices))
        return place / name, READS[how // 24 % 2]


class Zarr(Target):
    """A zarr store with one of its files changed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with readable_by_others(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _anndata().write_zarr(folder / "a.zarr")
        whole = folder / "a.zarr"
        files = sorted(path for path in whole.rglob("*") if path.is_file())
        self.files = {str(path.relative_to(whole)): path.read_bytes() for path in files}

    def make(self, choices: Choices, place: Path) -> tuple[Path, Callable[[Path], object]]:
        """A hostile store, and what reads it."""
        how, store = choices.number(), place / "a.zarr"
        name = choices.pick(list(self.files))
        for other, content in self.files.items():
            (store / other).parent.mkdir(parents=True, exist_ok=True)
            (store / other).write_bytes(content)
        content = self.files[name]
        if name.endswith(".json") and how % 4:
            content = json.dumps(edited_tree(json.loads(content), choices)).encode(errors="replace")
        elif how % 4 == 3:
            (store / name).unlink()
            return store, READS[how // 4 % 2]
        else:
            content = edited_bytes(content, choices)
        (store / name).write_bytes(content)
        return store, READS[how // 4 % 2]


class Mtx(Target):
    """A 10x folder of text with one of its three files another, plain or packed."""

    NAMES = ("matrix.mtx", "barcodes.tsv", "features.tsv")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        scipy.io.mmwrite(folder / "matrix.mtx", _counts()[:6, :8].T.tocoo(), field="integer")
        (folder / "barcodes.tsv").write_text("\n".join(f"c{n}" for n in range(6)) + "\n")
        (folder / "features.tsv").write_text("\n".join(f"ENSG{g}\tG{g}\tGene Expression" for g in range(8)) + "\n")

    def seeds(self) -> list[bytes]:
        """The files themselves."""
        return [bytes([n]) + (self.folder / self.NAMES[n % 3]).read_bytes() for n in range(6)]

    def make(self, choices: Choices, place: Path) -> tuple[Path, Callable[[Path], object]]:
        """A hostile folder, and what reads it."""
        how = choices.number()
        mtx = place / "mtx"
        mtx.mkdir()
        for n, name in enumerate(self.NAMES):
            content = choices.rest() if n == how % 3 else (self.folder / name).read_bytes()
            if how // 3 % 2:
                (mtx / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (mtx / name).write_bytes(content)
        return mtx, READS[how // 6 % 2]


class Text(Target):
    """Tables and YAML."""

    KINDS: Mapping[str, Callable[[Path], object]] = {
        "sheet.csv": read_sheet,
        "sheet.tsv": read_sheet,
        "filtered_contig_annotations.csv": read_receptors,
        "a.airr.tsv": read_receptors,
        "config.yaml": Config.read,
        "tree.yaml": LabelTree.read,
        "mapping.yaml": LabelMapping.read,
        "signatures.yaml": Signatures.read,
        "gate.yaml": Gate.read,
        "a.samples.csv": lambda path: read_side(path, {}, "compare.a", "sample"),
        "override": lambda path: Config.parse_overrides([path.read_text(encoding="utf-8", errors="replace")]),
    }

    def seeds(self) -> list[bytes]:
        """One text of every kind."""
        contig = "barcode,is_cell,contig_id,high_confidence,length,chain,v_gene,d_gene,j_gene,c_gene,full_length,"
        contig += "productive,cdr3,cdr3_nt,reads,umis,raw_clonotype_id,raw_consensus_id\n"
        contig += "AAACCTGAGAAACCAT-1,True,x_1,True,500,TRA,TRAV1,None,TRAJ2,TRAC,True,True,CAVF,TGTGCT,90,5,c1,k1\n"
        airr = "cell_id\tlocus\tjunction\tjunction_aa\tproductive\tv_call\tj_call\tduplicate_count\n"
        airr += "c1\tTRB\tTGTGCC\tCAS\tT\tTRBV1\tTRBJ1\t3\n"
        texts = (
            "sample,patient,timepoint_days,response\na,p1,0,CR\nb,p2,14,NR\n",
            "sample\tpatient\ttimepoint_days\na\tp1\t0\n",
            contig,
            airr,
            "seed: 1\ningest:\n  n_top_genes: 300\n  studies:\n    s: {path: a.h5ad, label: x, obs: {patient: d}}\n",
            label_file("tree").read_text(encoding="utf-8")[:700],
            "name: m\nmissing: [NA]\nlabels:\n  a: {state: memory}\n  b: {state: [memory, effector]}\n",
            "max_rank: 100\nsignatures:\n- {name: s, genes: [A, B], source: {paper: p}}\n",
            "of: mean\njudge: interval\nlimits:\n  fraction memory: {low: 0.1, high: 0.5}\n",
            "sample,patient,n_cells,n_cells_used,fraction memory,low fraction memory,high fraction memory\n"
            "a,p,20,18,0.5,0.4,0.6\n",
            "train.max_epochs=3",
        )
        return [bytes([kind]) + text.encode() for kind, text in enumerate(texts)]

    def make(self, choices: Choices, place: Path) -> tuple[Path, Callable[[Path], object]]:
        """A hostile text, and what reads it."""
        name = choices.pick(list(self.KINDS))
        (place / name).write_bytes(choices.rest())
        return place / name, self.KINDS[name]


def rehash(folder: Path) -> None:
    """Make the hashes of a model right again where model.json still is a description."""
    file = folder / "model.json"
    try:
        spec = json.loads(file.read_bytes())
        spec["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
        spec["sha256"] = NO_HASH
        text = json.dumps(spec, indent=1)
    except (ValueError, TypeError, RecursionError):
        return
    file.write_text(text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1), encoding="utf-8")


class Model(Target):
    """A model with one of its files changed, with the old hashes or with ones that fit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = {name: (KEPT / "model" / name).read_bytes() for name in ("model.json", *FILES)}

    def make(self, choices: Choices, place: Path) -> tuple[Path, Callable[[Path], object]]:
        """A hostile model, and what reads it."""
        how, folder = choices.number(), place / "model"
        shutil.copytree(KEPT / "model", folder)
        name = choices.pick(("model.json", "model.json", "model.json", "weights.safetensors", *FILES))
        content, plain = self.files[name], how % 4 == 0
        if name.endswith(".json") and not plain:
            content = json.dumps(edited_tree(json.loads(content), choices)).encode(errors="replace")
        elif name.endswith(".safetensors") and not plain:
            content = _other_header(content, choices)
        else:
            content = edited_bytes(content, choices)
        (folder / name).write_bytes(content)
        changed = content != self.files[name]
        if how // 4 % 4:
            rehash(folder)
            return folder, load
        return folder, _noticed if changed else load


def _other_header(content: bytes, choices: Choices) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(edited_tree(json.loads(content[8 : 8 + size]), choices)).encode(errors="replace")
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _noticed(path: Path) -> None:
    """Load a model that was changed and bears the old hashes."""
    load(path)
    raise Finding("a changed model was loaded")


TARGETS: Mapping[str, type[Target]] = {"hdf5": Hdf5, "zarr": Zarr, "mtx": Mtx, "text": Text, "bundle": Model}


def open_target(name: str, folder: Path) -> Target:
    """A target with its sources written to ``folder``; everything that is imported or compiled on first use is."""
    target = TARGETS[name](folder)
    place = folder / "first"
    for seed in target.seeds():
        place.mkdir()
        path, read = target.make(Choices(seed), place)
        with suppress(CarvaeError):
            read(path)
        shutil.rmtree(place)
    return target


def where(error: BaseException) -> str:
    """The last place of carvae in the way of an error, and its kind: what tells findings apart."""
    trace: Any = error.__traceback__
    found = "nowhere in carvae"
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/carvae/" in file and "site-packages" not in file:
            found = f"{file.rpartition('/carvae/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {found}"
