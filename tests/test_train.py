"""Training: the same weights every time, also after kill -9; schedules that complete; scores of held-out patients."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from apart import begin, command_line
from trained import STUDIES, World, carvae, settings, sha256, write_config

from carvae.config import Config
from carvae.data import order
from carvae.data.loader import Minibatch
from carvae.data.residence import Streamed
from carvae.data.split import split_patients
from carvae.data.store import CellStore
from carvae.errors import TrainError
from carvae.ingest import run as ingest
from carvae.ingest import work_folder
from carvae.model import trainer
from carvae.model.bundle import load
from carvae.model.cohort import Cohort
from carvae.model.metrics import score_axis
from carvae.model.objective import Objective
from carvae.model.run_log import wandb_mode

train = import_module("carvae.train")  # an import by name would give the verb
RUN_KILLED = 120
"""Seconds after which a run that writes no checkpoint is given up."""
SHORT = {"max_epochs": 3, "min_steps": 0}

# The loss of the first five steps of `GOLDEN_CONFIG`. A change here is a change of the model, its start, its data or
# its random numbers: if that was meant, run the test and copy the numbers that it prints.
GOLDEN = [1562.496, 1553.472, 1656.37, 1665.778, 1569.136]


def weights(output: Path) -> str:
    return sha256(output / "weights.safetensors")


def train_here(world: World, output: Path, **sections: Any) -> dict[str, Any]:
    """Train in this process through Python, on the world's own store; returns metrics.json."""
    if not work_folder(output).exists():
        shutil.copytree(work_folder(world.bundle) / "store.zarr", work_folder(output) / "store.zarr")
    config = Config.parse(settings(world.folder, output, **sections))
    metrics: dict[str, Any] = json.loads((train.run(config) / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def cohort_of(world: World, config: Config) -> Cohort:
    return Cohort.assemble(CellStore(ingest(config)), config)


def recorded(world: World, output: Path, **sections: Any) -> list[tuple[float, float]]:
    """KL weight and loss of every step of a run."""
    steps: list[tuple[float, float]] = []
    original = Objective._loss

    def spy(self: Any, batch: Minibatch, thin: Any, kl_weight: float | torch.Tensor) -> Any:
        loss, parts, answer = original(self, batch, thin, kl_weight)
        if thin is not None:
            steps.append((float(kl_weight), float(loss.detach())))
        return loss, parts, answer

    with mock.patch.object(Objective, "_loss", spy):
        train_here(world, output, **sections)
    return steps


# -- the same weights every time


def test_the_garbage_collector_is_given_back_as_it_was() -> None:
    with trainer.older_objects_left_alone():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_the_same_seed_gives_the_same_bits_whatever_the_caller_drew(world: World, tmp_path: Path) -> None:
    for name, drawn in (("a", 1), ("b", 2)):
        torch.manual_seed(drawn)
        np.random.seed(drawn)  # noqa: NPY002 - the global generator is what is meant
        train_here(world, tmp_path / name, train=SHORT)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    train.run(Config.parse(settings(world.folder, tmp_path / "c", train=SHORT) | {"seed": 1}))
    assert weights(tmp_path / "c") != weights(tmp_path / "a")


def killed(config: Path, folder: Path, checkpoints: Path) -> str:
    """Train in a process of its own, SIGKILL it as soon as the first checkpoint is there; returns what it said."""
    training = begin(command_line, "train", config, env=os.environ | {"WANDB_MODE": "disabled"}, cwd=folder)
    deadline = time.monotonic() + RUN_KILLED
    while not any(checkpoints.glob("*/last.ckpt")):
        assert training.process.exitcode is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run wrote no checkpoint"
        time.sleep(0.005)
    ended = training.kill()
    assert ended.returncode == -signal.SIGKILL
    return ended.stderr


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(world: World, tmp_path: Path) -> None:
    """Killed once in the held-out stage and once when training again on all patients."""
    sections: dict[str, Any] = {"train": {"max_epochs": 15, "min_steps": 0, "refit": True}}
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "killed", **sections))
    shutil.copytree(work_folder(world.bundle) / "store.zarr", tmp_path / "killed.work" / "store.zarr")
    told = []
    for stage in ("fit", "refit"):
        told.append(killed(path, tmp_path, tmp_path / "killed.work" / stage / "checkpoints"))
        assert not (tmp_path / "killed").exists()
    with mock.patch.object(train.log, "info") as said:
        train.run(Config.read(path))
    continued = [call.args for call in said.call_args_list if str(call.args[0]).startswith("continuing")]
    assert ["refit" in str(args[1]) for args in continued] == [False, True]
    assert ["continuing from" in text for text in told] == [False, True]
    train_here(world, tmp_path / "whole", **sections)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert sha256(tmp_path / "killed") == sha256(tmp_path / "whole")
    assert not list((tmp_path / "killed.work").rglob("*.ckpt"))


@pytest.fixture
def small_windows() -> Iterator[None]:
    with mock.patch.object(Streamed, "window", 128), mock.patch.object(order, "BLOCK", 16):
        yield


@pytest.mark.usefixtures("small_windows")
def test_a_run_that_streams_goes_on_streaming_and_ends_with_the_same_bits(world: World, tmp_path: Path) -> None:
    """Also where the counts would fit by then: streamed cells come in another order."""

    def die(self: Any) -> None:
        if self.current_epoch == 2:
            raise KeyError("killed")

    with mock.patch.object(train, "free_bytes", return_value=1e5), mock.patch.object(train.log, "info") as said:
        with mock.patch.object(Objective, "on_train_epoch_start", die), pytest.raises(KeyError):
            train_here(world, tmp_path / "a", train=SHORT)
    assert any(str(call.args[-1]).startswith("counts stream from the store: ") for call in said.call_args_list)
    with mock.patch.object(train.log, "info") as said:
        train_here(world, tmp_path / "a", train=SHORT)
    assert any("as in the run that goes on" in str(call.args[-1]) for call in said.call_args_list)
    train_here(world, tmp_path / "b", train=SHORT | {"data": "stream"})
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    train_here(world, tmp_path / "c", train=SHORT)
    assert weights(tmp_path / "c") != weights(tmp_path / "a"), "the order of cells was that of resident ones"


def test_streamed_and_resident_cells_in_one_window_start_alike(world: World, tmp_path: Path) -> None:
    """The moments of all training cells, read by stream, and the held-out scores of equal weights."""
    found = {}
    for kind in ("stream", "resident"):
        steps = recorded(world, tmp_path / kind, train={"max_epochs": 1, "min_steps": 0, "lr": 1e-30, "data": kind})
        bundle = load(tmp_path / kind)
        found[kind] = bundle.network.vae.log_theta_G.detach().numpy(), bundle.metrics["held_out"]["state"], len(steps)
    assert found["stream"][0] == pytest.approx(found["resident"][0], abs=1e-6)
    assert found["stream"][1]["accuracy"] == pytest.approx(found["resident"][1]["accuracy"])
    assert found["stream"][2] == found["resident"][2]


def test_a_changed_setting_does_not_continue_from_another_run(world: World, tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    def die(self: Any) -> None:
        if self.current_epoch == 1:
            raise KilledError

    with mock.patch.object(Objective, "on_train_epoch_start", die), pytest.raises(KilledError):
        train_here(world, tmp_path / "a", train=SHORT)
    assert list((tmp_path / "a.work").rglob("last.ckpt"))
    table = work_folder(tmp_path / "a") / "fit" / "log" / "metrics.csv"
    before = table.read_text(encoding="utf-8")
    (table.parents[1] / "wandb" / "offline-run-1").mkdir(parents=True)
    with mock.patch.object(Objective, "on_train_epoch_start", die), pytest.raises(KilledError):
        train_here(world, tmp_path / "a", train=SHORT)
    assert table.read_text(encoding="utf-8") == before, "going on lost the log, or told it twice"
    changed = SHORT | {"lr": 1e-3}
    train_here(world, tmp_path / "a", train=changed)
    train_here(world, tmp_path / "b", train=changed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert len(log_rows(tmp_path / "a", "val_loss")) == 3, "rows of the other run are left"
    assert (table.parents[1] / "wandb" / "offline-run-1").exists()


def test_an_interrupt_ends_training_as_any_command_and_tells_where_it_goes_on(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(self: Any) -> None:
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    with (
        caplog.at_level("WARNING", "carvae"),
        mock.patch.object(Objective, "on_train_epoch_start", interrupted),
        pytest.raises(KeyboardInterrupt),
    ):
        train_here(world, tmp_path / "a", train=SHORT)
    assert "interrupted in epoch 2; the same command goes on from there" in caplog.text
    assert not (tmp_path / "a").exists()


def test_a_run_that_goes_on_has_the_log_of_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    def die(self: Any) -> None:
        if self.current_epoch == 2:
            raise KeyError("killed")

    with mock.patch.object(Objective, "on_train_epoch_start", die), pytest.raises(KeyError):
        train_here(world, tmp_path / "a", train=SHORT)
    for name in ("a", "b"):
        train_here(world, tmp_path / name, train=SHORT)
    for column in ("train_loss", "val_loss"):
        one, other = ([row[column] for row in log_rows(tmp_path / name, column)] for name in ("a", "b"))
        assert len(one) == 3
        assert one == other


def test_cuda_without_a_gpu_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = Config.parse({"output": str(tmp_path / "m"), "train": {"accelerator": "cuda"}})
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        with pytest.raises(TrainError, match=r"train\.accelerator is cuda, but torch finds no CUDA device"):
            train.run(config)


# -- schedules


@pytest.mark.parametrize(("epochs", "share"), [(1, 0.5), (3, 0.2), (3, 1.0), (1, 0.0)])
def test_the_kl_warm_up_completes_by_its_share_however_short_the_run(
    world: World, tmp_path: Path, epochs: int, share: float
) -> None:
    steps = recorded(
        world, tmp_path / "m", train={"max_epochs": epochs, "min_steps": 0, "kl_warmup": share, "kl_weight": 0.7}
    )
    weight = np.array([w for w, _ in steps])
    assert (np.diff(weight) >= 0).all()
    assert weight.max() == pytest.approx(0.7)
    np.testing.assert_allclose(weight[int(np.ceil(share * weight.size)) - 1 :] if share else weight, 0.7)
    if share and weight.size > 5:
        assert weight[0] < 0.3


def test_small_data_get_the_least_number_of_steps(world: World, tmp_path: Path) -> None:
    steps = recorded(world, tmp_path / "m", train={"max_epochs": 1, "min_steps": 17, "validation_share": 0})
    assert 17 <= len(steps) < 17 + 8


def test_training_stops_where_the_held_out_loss_does_not_fall(world: World, tmp_path: Path) -> None:
    # a learning rate far too high for these data, so that the loss rises after a while
    sections = {"train": {"max_epochs": 60, "min_steps": 0, "patience": 2, "lr": 0.03}}
    metrics = train_here(world, tmp_path / "m", **sections)
    losses = [float(row["val_loss"]) for row in log_rows(tmp_path / "m", "val_loss")]
    assert len(losses) < 60
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 2
    assert metrics["epochs"] == best + 1
    # the weights are those of the best epoch, not of the last
    bundle, config = load(tmp_path / "m"), Config.parse(settings(world.folder, tmp_path / "m", **sections))
    cohort, split = held_out_of(world, config)
    module = Objective(bundle.network, cohort.data(split.train, config), cohort, split, config)
    total, n = 0.0, 0
    for batch in module.val_dataloader():
        with torch.no_grad():
            loss, _, _ = module._loss(batch, None, config.train.kl_weight)
        total, n = total + float(loss) * batch.counts.n_cells, n + batch.counts.n_cells
    assert total / n == pytest.approx(losses[best], rel=1e-4)


def log_rows(output: Path, column: str) -> list[dict[str, str]]:
    import csv

    with (work_folder(output) / "fit" / "log" / "metrics.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


GOLDEN_CONFIG: dict[str, Any] = {
    "train": {"max_epochs": 1, "min_steps": 0},
    "model": {"n_latent": 8, "n_hidden": 32, "n_layers": 2},
}


def test_the_first_steps_are_those_of_the_day_they_were_stored(world: World, tmp_path: Path) -> None:
    steps = recorded(world, tmp_path / "m", **GOLDEN_CONFIG)
    seen = [round(loss, 3) for _, loss in steps[:5]]
    assert seen == pytest.approx(GOLDEN, rel=1e-4), f"GOLDEN = {seen}"


def test_the_loss_falls(world: World, tmp_path: Path) -> None:
    train_here(world, tmp_path / "m", train={"max_epochs": 8, "min_steps": 0})
    for column in ("train_loss", "val_loss"):
        losses = [float(row[column]) for row in log_rows(tmp_path / "m", column)]
        assert losses[-1] < losses[0] - 20


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_mad_learning_rate_is_said_or_survived(world: World, tmp_path: Path, lr: float) -> None:
    path = write_config(tmp_path / "c.yaml", settings(world.folder, tmp_path / "m", train=SHORT | {"lr": lr}))
    answer = carvae("train", path)
    assert "Traceback" not in answer.err
    if answer.code:
        assert answer.code == 1
        assert "lower train.lr" in answer.err
        assert answer.err.count("\n") == 1
        assert not (tmp_path / "m").exists()
    else:
        load(tmp_path / "m")  # which checks that every weight is finite
    with pytest.raises(TrainError, match=r"lower train\.lr \(now 1e\+30\)"):
        train_here(world, tmp_path / "n", train=SHORT | {"lr": 1e30})


# -- labels


def test_a_study_without_labels_teaches_the_latent_space_alone(world: World, tmp_path: Path) -> None:
    config = Config.read(world.config)
    cohort = cohort_of(world, config)
    study = cohort.obs["study"].astype(str).to_numpy()
    assert not cohort.labelled_N[study == "sim_paediatric"].any()
    assert cohort.labelled_N[study == "sim_lymphoma"].all()
    data = cohort.data(np.arange(study.size), config)
    assert (data.code_NA.numpy()[study == "sim_paediatric"] == -1).all()
    # the words of a study without labels change nothing but the latent space: its cells add no label loss
    assert (data.weight_NA.numpy()[study == "sim_paediatric"] == 0).all()


def test_labels_of_one_patient_give_a_model_that_claims_no_confidence(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The network that the patient is held out of sees no label: what it guesses is nothing to learn from."""
    cells = world.studies["sim_lymphoma"].copy()
    first = cells.obs["donor_id"].astype(str) == cells.obs["donor_id"].astype(str).iloc[0]
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).where(first, "")
    cells.write_h5ad(tmp_path / "one.h5ad")
    sections: dict[str, Any] = {"train": SHORT | {"calibration_folds": 3}, "labels": {"tree": "flat"}}
    config = settings(world.folder, tmp_path / "m", **sections)
    study = {key: STUDIES["sim_lymphoma"][key] for key in ("obs", "label")} | {"path": str(tmp_path / "one.h5ad")}
    config["ingest"]["studies"] = {"one": study}
    path = write_config(tmp_path / "c.yaml", config)
    checked = carvae("check", path)
    assert "labels of at least two patients" in checked.out
    assert "networks" not in checked.out, "one network alone is trained"
    answer = carvae("train", path)
    assert answer.code == 0, answer.err
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("how sure labels of state are cannot be learned")
    assert "labels of at least two patients" in said
    made = load(tmp_path / "m")
    assert made.trust is None
    assert made.tree is not None
    assert "Its confidence is not calibrated" in (tmp_path / "m" / "card.md").read_text(encoding="utf-8")
    out = tmp_path / "A.csv"
    answer = carvae("annotate", world.query_path, "--model", tmp_path / "m", "--out", out, "predict.coverage=0.9")
    assert answer.code == 1
    assert "not calibrated" in answer.err
    assert "Traceback" not in answer.err
    assert not out.exists()
    assert carvae("annotate", world.query_path, "--model", tmp_path / "m", "--out", out).code == 0
    assert "carvae_novelty" not in out.read_text(encoding="utf-8").splitlines()[0]


def test_no_labels_at_all_give_a_model_that_embeds(world: World, tmp_path: Path) -> None:
    config = settings(world.folder, tmp_path / "m", train=SHORT, labels={"tree": "flat"})
    config["ingest"]["studies"] = {"one": {"path": str(world.folder / "sim_paediatric.h5ad")}}
    config["ingest"]["studies"]["one"]["obs"] = STUDIES["sim_paediatric"]["obs"]
    path = write_config(tmp_path / "c.yaml", config)
    assert carvae("train", path).code == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text(encoding="utf-8"))
    assert "held_out" not in metrics
    assert load(tmp_path / "m").tree is None
    out = tmp_path / "E.csv"
    assert carvae("embed", world.query_path, "--model", tmp_path / "m", "--out", out).code == 0
    assert out.exists()
    answer = carvae("annotate", world.query_path, "--model", tmp_path / "m", "--out", tmp_path / "A.csv")
    assert answer.code == 1
    assert "trained without labels; use `carvae embed`" in answer.err
    assert not (tmp_path / "A.csv").exists()


# -- scores


def held_out_of(world: World, config: Config) -> tuple[Cohort, Any]:
    cohort = cohort_of(world, config)
    rng = np.random.default_rng((config.seed, 2))
    return cohort, split_patients(cohort.obs["patient"], cohort.labelled_N, config.train.validation_share, rng)


def test_the_scores_are_of_held_out_patients_alone(world: World) -> None:
    config = Config.read(world.config)
    metrics = json.loads((world.bundle / "metrics.json").read_text(encoding="utf-8"))
    cohort, split = held_out_of(world, config)
    held, patient = set(split.validation_patients), cohort.obs["patient"].astype(str).to_numpy()
    assert held
    assert set(patient[split.validation]) == held
    assert not held & set(patient[split.train])
    assert metrics["held_out_patients"] == len(held)
    asked = cohort.store.counts(split.validation), cohort.store.measured, cohort.study_N[split.validation]
    prediction = load(world.bundle).network.predict_studies(*asked)
    assert cohort.cohort_labels is not None
    for axis in cohort.cohort_labels.tree.axes:
        leaf = cohort.cohort_labels.labels[axis.name].leaf[split.validation]
        expected = score_axis(prediction.probability_NS[axis.name], leaf, axis.leaves)
        if expected is None:
            assert axis.name not in metrics["held_out"]
            continue
        found = metrics["held_out"][axis.name]
        assert found["n_cells"] == int((leaf >= 0).sum())
        assert found["accuracy"] == pytest.approx(expected.accuracy)
        assert found["macro_f1"] == pytest.approx(expected.macro_f1)
        assert np.sum(found["confusion"]) == found["n_cells"]
    grid = metrics["macro_f1_by_missing_genes"]
    assert grid["0"] == pytest.approx(metrics["held_out"]["state"]["macro_f1"])


def test_nothing_held_out_gives_metrics_without_scores(world: World, tmp_path: Path) -> None:
    metrics = train_here(world, tmp_path / "m", train=SHORT | {"validation_share": 0})
    assert metrics["epochs"] == 3
    assert "held_out" not in metrics
    assert "no labelled patient was held out" in (tmp_path / "m" / "card.md").read_text(encoding="utf-8").lower()


def test_refitted_weights_keep_the_scores_of_the_run_before(world: World, tmp_path: Path) -> None:
    one = {"max_epochs": 1, "min_steps": 0}
    before = train_here(world, tmp_path / "a", train=one)
    after = train_here(world, tmp_path / "b", train=one | {"refit": True})
    assert after["held_out"] == before["held_out"]
    assert after["refit"] is True
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_a_failed_run_leaves_the_model_that_was_there(world: World, tmp_path: Path) -> None:
    train_here(world, tmp_path / "m", train=SHORT)
    before = sha256(tmp_path / "m")
    with pytest.raises(TrainError):
        train_here(world, tmp_path / "m", train=SHORT | {"lr": 1e30})
    assert sha256(tmp_path / "m") == before


def test_settings_are_saved_beside_the_model(world: World) -> None:
    saved = Config.read(work_folder(world.bundle) / "config.yaml")
    assert saved == Config.read(world.config)


# -- the network logger


def secrets(world: World) -> set[bytes]:
    """What may not leave: patients, samples, barcodes, and where the studies lie."""
    found = {str(world.folder).encode()}
    for name, study in STUDIES.items():
        obs = world.studies[name].obs
        found |= {v.encode() for c in ("patient", "sample") for v in obs[study["obs"][c]].astype(str).unique()}
        found.add(str(obs.index[0]).encode())
    return found


PANELS = (
    *(b"loss/training", b"loss/held_out", b"states/state_macro_f1", b"states/state_ece", b"recall/state: "),
    *(b"studies/held_out_loss_of_study_1", b"studies/all", b"terms/training_kl", b"terms/held_out_kl"),
    *(b"maps/cells", b"confusion/state", b"wandb/confusion_matrix/v1", b"wandb/lineseries/v0"),
)


def test_wandb_works_offline_without_an_account_and_tells_no_names(world: World, tmp_path: Path) -> None:
    config = settings(world.folder, tmp_path / "m", train=SHORT | {"wandb": "offline", "map_every": 3})
    # excluded patients on the command line are names too
    excluded = str(world.studies["sim_lymphoma"].obs["donor_id"].iloc[0])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {
        "HOME": str(tmp_path / "home"),
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    (tmp_path / "home").mkdir()
    command = ("train", write_config(tmp_path / "c.yaml", config), f"ingest.exclude_patients=[{excluded}]")
    done = begin(command_line, *command, env=environment, cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert "wandb:" not in done.stderr
    files = [p for p in tmp_path.rglob("*") if "wandb" in p.relative_to(tmp_path).parts and p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert all({tmp_path / "m.work", tmp_path / "home"} & set(p.parents) for p in files)
    content = b"\n".join(p.read_bytes() for p in files)
    for panel in PANELS:
        assert panel in content, panel
    assert b"kl_warmup" in content
    for secret in secrets(world):
        assert secret not in content


def test_bfloat16_is_float32_where_the_processor_has_no_products_of_it(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.parse({"train": {"precision": "bf16-mixed", "accelerator": "cpu"}})
    with caplog.at_level("INFO"), mock.patch.object(trainer, "has_bfloat16", return_value=False):
        assert trainer._precision(config) == "32-true"
    assert "no bfloat16 products" in caplog.text
    with mock.patch.object(trainer, "has_bfloat16", return_value=True):
        assert trainer._precision(config) == "bf16-mixed"


@pytest.mark.parametrize(
    ("setting", "environment", "mode"),
    [
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "dryrun", "offline"),
        ("online", "", "online"),
        ("offline", "disabled", "disabled"),
        ("offline", "shared", "offline"),
    ],
)
def test_the_environment_can_make_wandb_less_public_alone(setting: str, environment: str, mode: str) -> None:
    assert wandb_mode(setting, environment) == mode


def test_wandb_can_be_switched_off(world: World) -> None:
    assert not list(world.folder.rglob("*wandb*"))
    assert (work_folder(world.bundle) / "fit" / "log" / "metrics.csv").exists()
