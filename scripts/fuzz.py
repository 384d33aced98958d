"""Mutate files at random and open them: python scripts/fuzz.py --target readers|bundle --seconds 600 --seed 0.

What is opened must be read or refused by a `CarvaeError`; any other exception, a signal, or a case of more than ten
seconds is a finding, told with the seed that makes it again (``--only SEED``). Prints one line of JSON; the exit code
is 1 where anything was found. Cases run in forked children, which a library that crashes takes with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # GNU OpenMP ends a process that forks

from carvae.data.readers import open_source
from carvae.errors import CarvaeError
from carvae.model.bundle import load
from carvae.model.bundle_files import FILES, NO_HASH

KEPT = Path(__file__).resolve().parents[1] / "tests" / "bundles" / "0.1.0"
BATCH = 100
"""Cases of one child."""
LIMIT = 10
"""Seconds after which a case hangs."""
TOKENS = [b"0", b"-1", b"1e309", b"NaN", b"null", b'"', b"{", b"[", b"\x00", b"\xff" * 8, b"9" * 20, b"../", b"\n"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 8, 64, 4096))]
        elif kind == 2:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            data[at : at + 8] = rng.randbytes(8)
        elif kind == 4 and rng.random() < 0.2:
            del data[at:]
        else:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.choice((1, 16, 256))]
    return bytes(data)


def rehash(folder: Path) -> None:
    """Make the hashes right again where model.json still is a description."""
    file = folder / "model.json"
    try:
        spec = json.loads(file.read_bytes())
        spec["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
        spec["sha256"] = NO_HASH
        text = json.dumps(spec, indent=1)
    except (ValueError, TypeError, RecursionError):
        return
    file.write_text(text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest(), 1), encoding="utf-8")


def sources(folder: Path) -> list[Path]:
    """Small files of every format that is read."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.4, 3.0, (20, 30))).astype(np.int32))
    adata = ad.AnnData(counts)
    adata.var_names = [f"GENE{g}" for g in range(30)]
    adata.obs["sample"] = ["a", "b"] * 10
    with ad.settings.override(allow_write_nullable_strings=False):
        adata.write_h5ad(folder / "a.h5ad")
        adata.write_h5ad(folder / "packed.h5ad", compression="gzip")
        adata.write_zarr(folder / "a.zarr")
    with h5py.File(folder / "tenx.h5", "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        group["shape"] = np.array([30, 20])
        group["barcodes"] = np.array([f"c{n}" for n in range(20)], "S")
        for key, value in (("name", "G"), ("id", "ENSG0000000000"), ("feature_type", None)):
            names = ["Gene Expression" if value is None else f"{value}{g}" for g in range(30)]
            group[f"features/{key}"] = np.array(names, "S")
    mtx = folder / "mtx"
    mtx.mkdir()
    scipy.io.mmwrite(mtx / "matrix.mtx", counts.T.tocoo(), field="integer")
    (mtx / "barcodes.tsv").write_text("\n".join(f"c{n}" for n in range(20)) + "\n")
    (mtx / "features.tsv").write_text("\n".join(f"ENSG{g}\tG{g}\tGene Expression" for g in range(30)) + "\n")
    return sorted(folder.iterdir())


def spoil(original: Path, rng: random.Random, copy: Path) -> Path:
    """A copy of a file or folder with one of its files mutated."""
    target = copy / original.name
    if original.is_dir():
        shutil.copytree(original, target)
        file = rng.choice(sorted(p for p in target.rglob("*") if p.is_file()))
    else:
        shutil.copyfile(original, target)
        file = target
    file.write_bytes(mutated(file.read_bytes(), rng))
    return target


def try_bundle(seed: int, seeds: list[Path], copy: Path) -> None:
    """Open a mutated model; every second one with right hashes, so that more than the hash is tried."""
    rng = random.Random(seed)
    folder = spoil(seeds[0], rng, copy)
    if rng.random() < 0.5:
        rehash(folder)
    load(folder)


def try_reader(seed: int, seeds: list[Path], copy: Path) -> None:
    """Open a mutated source and read all of it."""
    rng = random.Random(seed)
    for _ in open_source(spoil(rng.choice(seeds), rng, copy)).chunks():
        pass


def batch(first: int, n: int, one: Callable[[int, list[Path], Path], None], seeds: list[Path]) -> list[str]:
    """What was found in the cases of some seeds, each tried in one forked child."""
    said, into = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(said)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a case that hangs ends the child
        for seed in range(first, first + n):
            os.write(into, f"@{seed}\n".encode())
            signal.alarm(LIMIT)
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    one(seed, seeds, Path(scratch))
                except CarvaeError as error:
                    if "\n" in str(error).strip() and "problems" not in str(error):
                        os.write(into, f"! {seed}: {str(error)!r}\n".encode())
                except BaseException as error:  # noqa: BLE001 - this is what is sought
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    os.write(into, f"! {seed}: {error!r:.200} at {where.filename}:{where.lineno}\n".encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(said) as lines:
        text = lines.read().splitlines()
    _, status = os.waitpid(process, 0)
    found = [line[2:] for line in text if line.startswith("! ")]
    if code := os.waitstatus_to_exitcode(status):
        last = [line for line in text if line.startswith("@")][-1]
        found.append(f"{last[1:]}: the process ended with {signal.Signals(-code).name if code < 0 else code}")
    return found


def main() -> None:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=["readers", "bundle"], required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [KEPT / "model"] if given.target == "bundle" else sources(Path(folder))
        one = try_bundle if given.target == "bundle" else try_reader
        load(KEPT / "model")  # what is imported or compiled on first use is no hang
        for path in seeds if given.target == "readers" else ():
            for _ in open_source(path).chunks():
                pass
        if given.only is not None:
            print("\n".join(batch(given.only, 1, one, seeds)) or "nothing was found")
            return
        began, first, found = time.monotonic(), given.seed * 10**9, []
        n = first
        while time.monotonic() - began < given.seconds:
            found += batch(n, BATCH, one, seeds)
            n += BATCH
    told = {"target": given.target, "seed": given.seed, "executions": n - first, "found": found[:50]}
    print(json.dumps(told | {"seconds": round(time.monotonic() - began), "n_found": len(found)}))
    sys.exit(int(bool(found)))


if __name__ == "__main__":
    main()
