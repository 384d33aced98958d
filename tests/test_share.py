"""A shared model: the same embedding and states, no decoder, nothing of single samples; what needs one says so."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from safetensors.torch import load_file
from trained import World, carvae, sha256

from carvae.errors import BundleError
from carvae.map import map_query
from carvae.model.bundle import Bundle, load
from carvae.model.scvi_bridge import to_scvi
from carvae.model.share import shareable
from carvae.predict import annotate
from carvae.web.sample import write_sample

KEPT = Path(__file__).resolve().parent / "bundles" / "0.1.0-layout4" / "model"


@pytest.fixture(scope="module")
def shared(sure: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Shared, written and read again."""
    return load(shareable(sure).save(tmp_path_factory.mktemp("shared") / "model"))


def test_it_embeds_and_labels_as_the_whole_model_and_has_novelty_of_its_own(
    world: World, sure: Bundle, shared: Bundle
) -> None:
    said, whole = annotate(world.query, shared), annotate(world.query, sure)
    np.testing.assert_array_equal(said.obsm["X_carvae"], whole.obsm["X_carvae"])
    np.testing.assert_array_equal(said.obsm["carvae_probability"], whole.obsm["carvae_probability"])
    for column in ("carvae_state_best", "carvae_confidence"):
        assert said.obs[column].tolist() == whole.obs[column].tolist()
    novelty = said.obs["carvae_novelty"].to_numpy()
    assert ((novelty >= 0) & (novelty <= 1)).all()
    assert np.corrcoef(novelty, whole.obs["carvae_novelty"])[0, 1] > 0.5
    assert shared.trust is not None
    assert sure.trust is not None
    assert sure.trust.undecoded is not None
    assert list(said.obs["carvae_state"] == "unknown") == list(novelty > 1 - shared.trust.unknown_rate)
    np.testing.assert_array_equal(shared.trust.limits.care_F, sure.trust.undecoded.limits.care_F)  # type: ignore[union-attr]


def test_noise_is_strange_without_a_decoder_too(world: World, shared: Bundle) -> None:
    query = world.query.copy()
    rng = np.random.default_rng(0)
    shuffled = query.X.tocsr().astype(np.int32)
    shuffled.indices = rng.permutation(query.n_vars).astype(np.int32)[shuffled.indices]
    query.X = shuffled
    known = (annotate(world.query, shared).obs["carvae_novelty"]).mean()
    assert annotate(query, shared).obs["carvae_novelty"].mean() > known + 0.2


def test_nothing_of_the_decoder_or_of_a_sample_is_in_the_files(sure: Bundle, tmp_path: Path) -> None:
    whole, made = load_file(sure.save(tmp_path / "whole") / "weights.safetensors"), shareable(sure)
    weights = load_file(made.save(tmp_path / "shared") / "weights.safetensors")
    assert not [name for name in weights if "decoder." in name or "theta" in name or "undecoded" in name]
    assert [name for name in whole if "decoder." in name]
    np.testing.assert_allclose(
        weights["trust.reference.sample_MK"], whole["trust.reference.sample_MK"].mean(0, keepdim=True), rtol=1e-5
    )
    text = (tmp_path / "shared" / "metrics.json").read_text() + (tmp_path / "shared" / "card.md").read_text()
    assert "confusion" not in text
    assert "Shared without its decoder" in made.card
    assert "Can it be told whom it was trained on?" in made.card
    assert set(sure.metrics["membership"]["attacks"]) == {"loss", "confidence", "novelty"}


def test_what_needs_the_decoder_refuses_in_one_sentence(world: World, shared: Bundle, tmp_path: Path) -> None:
    for verb in (
        lambda: map_query(world.query, shared),
        lambda: to_scvi(shared, world.query),
        lambda: write_sample(shared, tmp_path / "demo.h5ad"),
        lambda: shareable(shared),
    ):
        with pytest.raises(BundleError, match=r"without its decoder, which .* needs|no decoder any more"):
            verb()
    folder = shared.save(tmp_path / "shared")
    for verb, out, words in (
        ("map", "mapped", "shared without its decoder, which mapping needs"),
        ("respond", "outcomes.csv", "`carvae export --share`, which leaves out what predicts outcomes"),
    ):
        answer = carvae(verb, world.query_path, "--model", folder, "--out", tmp_path / out)
        assert answer.code == 1
        assert words in answer.err.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shared"]


def test_by_the_command_line(world: World, tmp_path: Path) -> None:
    answer = carvae("export", world.bundle, "--share", "--out", tmp_path / "shared")
    assert (answer.code, answer.out) == (0, "")
    for model, out in ((world.bundle, "whole.h5ad"), (tmp_path / "shared", "shared.h5ad")):
        answer = carvae("annotate", world.query_path, "--model", model, "--out", tmp_path / out)
        assert answer.code == 0, answer.err
    whole, said = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("whole", "shared"))
    assert whole.obs["carvae_state"].tolist() == said.obs["carvae_state"].tolist()
    assert carvae("export", world.bundle, "--out", tmp_path / "copy").code == 0
    assert sha256(tmp_path / "copy") == sha256(world.bundle)
    repo = ("hub", "export", tmp_path / "shared", "--out", tmp_path / "repo", "--licence", "mit")
    assert carvae(*repo).code == 0


def test_what_cannot_be_shared_is_refused_and_nothing_is_left(world: World, tmp_path: Path) -> None:
    before = sha256(KEPT)
    answer = carvae("export", KEPT, "--share", "--out", tmp_path / "old")
    assert answer.code == 1
    assert "train it again, or share it whole" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert carvae("export", KEPT, "--out", tmp_path / "copy").code == 0
    assert sha256(tmp_path / "copy") == before, "an old model is still copied, as it is"
    (tmp_path / "file").write_text("mine")
    for out, words in (
        (world.bundle, "is the model itself or lies in it"),
        (world.bundle / "inside", "is a model or lies in one"),
        (tmp_path / "file", "is a file, and a model is a folder; choose another output"),
    ):
        answer = carvae("export", world.bundle, "--share", "--out", out)
        assert answer.code == 1
        assert words in answer.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert carvae("export", world.bundle, "--share", "--out", tmp_path / "full").code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "file", "full"]
    assert sha256(KEPT) == before
