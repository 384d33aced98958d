"""Whether the counts fit is computed beforehand, and said."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import config_of, counts_of, obs_of, write_store

from carvae.data import memory
from carvae.data.memory import Need, choose, free_bytes
from carvae.data.residence import read
from carvae.errors import TrainError

CPU = torch.device("cpu")
NEED = Need(counts=600_000_000, minibatch=200_000_000)


def test_the_size_of_the_counts_is_what_they_take(tmp_path: Path) -> None:
    for name, counts in (("narrow", counts_of(50)), ("wide", counts_of(50) * 70_000)):
        store = write_store(tmp_path / name, counts, obs_of({"a": 50}))
        rows = np.arange(10, 30)
        compact = read(store, rows, CPU)
        need = Need.of(store, rows, config_of(), 16)
        beside = 50 * 8 * (3 + 2) + 50 * 24
        assert need.counts == compact.entry_M2.nbytes + beside
        assert compact.entry_M2.nbytes == counts[rows].nnz * (4 if name == "narrow" else 8)


def test_minibatches_need_more_where_they_are_larger_or_have_more_genes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", counts_of(50), obs_of({"a": 50}))
    need = [Need.of(store, np.arange(50), config_of(train={"batch_size": size}), 16).minibatch for size in (10, 20)]
    dense = 4 * 10 * 12
    assert need[1] - need[0] >= dense
    zinb = config_of(train={"batch_size": 10}, model={"gene_likelihood": "zinb"})
    assert Need.of(store, np.arange(50), zinb, 16).minibatch > need[0] + dense


@pytest.mark.parametrize(
    ("wanted", "free", "resident", "said"),
    [
        ("auto", 1.1e9, True, "counts are resident: counts and labels take 0.60 GB and minibatches 0.20 GB, 1.10 GB"),
        ("auto", 0.9e9, False, "counts stream from the store: .* 0.90 GB are free on cpu, of which 80%"),
        ("resident", 0.9e9, True, "counts are resident, as was said"),
        ("stream", 1e12, False, "counts stream from the store, as was said"),
    ],
)
def test_the_choice_is_by_size_unless_it_is_made(wanted: str, free: float, resident: bool, said: str) -> None:
    choice = choose(NEED, free, CPU, wanted, "as was said")
    assert choice.resident is resident
    assert "\n" not in choice.reason
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(choice.reason)


def test_what_cannot_be_resident_is_refused() -> None:
    with pytest.raises(TrainError, match=r"to be resident, as was said, but .* 0.70 GB are free on cpu; set"):
        choose(NEED, 0.7e9, CPU, "resident", "as was said")


def group(root: Path, name: str, limit: str, used: int, cached: int = 0) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return folder


def test_the_limits_of_control_groups_count(tmp_path: Path) -> None:
    """The tightest of the process's own group and those above it, files in the cache not counted."""
    groups = tmp_path / "groups"
    groups.write_text("0::/slurm/job\n")
    assert memory._free_in_group(tmp_path / "none", groups) == np.inf
    assert memory._free_in_group(tmp_path, tmp_path / "missing") == np.inf
    root = tmp_path / "cgroup"
    group(root, "slurm/job", "max", 70)
    assert memory._free_in_group(root, groups) == np.inf
    group(root, "slurm", "1000", 600, cached=50)
    assert memory._free_in_group(root, groups) == 450
    group(root, "slurm/job", "500", 300)
    assert memory._free_in_group(root, groups) == 200


def test_processes_of_one_machine_share_its_memory() -> None:
    with (
        mock.patch.object(memory, "_free_on_machine", return_value=900.0),
        mock.patch.object(memory, "_free_in_group", return_value=600.0),
    ):
        assert free_bytes(CPU, 2) == 300


def test_some_memory_is_free_here() -> None:
    assert 1 << 20 < memory._free_on_machine() < 1 << 50


@pytest.mark.gpu
def test_a_gpu_says_what_is_free() -> None:
    assert 1 << 20 < free_bytes(torch.device("cuda", 0)) <= torch.cuda.mem_get_info(0)[1]
