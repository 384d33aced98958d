"""The model bundle: a folder that any later carvae opens, that executes nothing, and that notices a changed byte.

``weights.safetensors``, ``card.md`` and ``metrics.json`` are hashed in ``model.json``, which also bears its own hash
(taken with the hash's place filled by zeros). No covariate value, patient or path is in it: categories are counted,
not named, and those that `carvae map` adds are told again by a salted digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from carvae.config import ModelConfig, PredictConfig
from carvae.data.atomic import replacing_folder
from carvae.data.genes import GeneAlignment, GeneTable, ResolvedGenes, align
from carvae.data.readers import CountsSource, open_source
from carvae.errors import BundleError, CountsError, GeneError, LabelError
from carvae.labels.axis import main_first
from carvae.labels.signatures import Signatures
from carvae.labels.tree import LabelTree
from carvae.model.bundle_files import (
    COMPLETES,
    FILES,
    FORMAT,
    NO_HASH,
    check_files,
    check_place,
    hash_of,
    read_description,
    read_metrics,
    stamps,
)
from carvae.model.completion import Completion
from carvae.model.network import Network, Prediction
from carvae.model.responder import PREFIX as RESPONSE
from carvae.model.responder import Responder
from carvae.model.trust import PREFIX, Trust

if TYPE_CHECKING:
    from anndata import AnnData

DECODER = ("vae.decoder.", "vae.log_theta_G")
"""Starts of the names of the decoder's weights."""
TRIES = 100
"""How often a bundle is read again that was replaced while it was read."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a bundle comes from, in words that name no patient."""

    carvae_version: str
    seed: int
    data_fingerprint: str
    """Hash of all training cells, their counts and columns."""
    n_cells: int
    n_patients: int
    n_studies: int
    weak_labels: bool
    """Whether any label was derived from signatures."""
    libraries: dict[str, str]
    """Library -> version."""


def libraries() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: version(name) for name in ("torch", "scvi-tools", "anndata", "lightning", "numpy")}


@dataclass(slots=True)
class Bundle:
    """A trained model with everything that a query needs.

    The methods bear scvi-tools' names; they take an AnnData with raw counts, any gene order, symbols or Ensembl ids.
    """

    network: Network
    genes: tuple[str, ...]
    tree: LabelTree | None
    """None for a model trained without labels."""
    signatures: Signatures
    config: ModelConfig
    n_categories: dict[str, int]
    """Covariate -> number of categories seen in training."""
    gene_policy: tuple[str, ...]
    provenance: Provenance
    trust: Trust | None = None
    """How sure it is; None unless trained with ``train.calibration_folds``, and in bundles of layout 1."""
    responder: Responder | None = None
    """What predicts outcomes; None unless trained with ``respond.columns``."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Held-out scores (see ``metrics.json``)."""
    card: str = ""
    bundle_id: str = ""
    """Start of the hash of model.json; set by `save` and `load`."""
    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Covariate -> digests of the names of the categories that `carvae map` added, in the order of their rows."""

    @property
    def n_rows(self) -> dict[str, int]:
        """Covariate -> number of categories that it has a row for, trained and mapped."""
        return {name: n + len(self.mapped.get(name, ())) for name, n in self.n_categories.items()}

    def digest(self, covariate: str, name: str) -> str:
        """What stands for a category's name in a bundle: slow to make, so that guessing names is dear."""
        salt = f"{self.provenance.data_fingerprint}/{covariate}".encode()
        return hashlib.scrypt(name.encode(), salt=salt, n=2**14, r=8, p=1, dklen=16).hex()

    def rows_of(self, covariate: str, names: Iterable[object]) -> NDArray[np.int64]:
        """Row of each category in the covariate's table: that of a mapped name, -1 for any other name.

        Names of training categories are not in a bundle, so that their rows are found by nobody.

        Raises
        ------
        BundleError
            The model has no such covariate.
        """
        if covariate not in self.n_categories:
            raise BundleError(
                f"the model has no covariate {covariate!r}; it has {', '.join(self.n_categories) or 'none'}"
            )
        first, known = self.n_categories[covariate], self.mapped.get(covariate, ())
        code_N, values = pd.factorize(np.array([str(name) for name in names], dtype=object))
        digests = [self.digest(covariate, str(value)) for value in values] if known else []
        row_V = [first + known.index(digest) if digest in known else -1 for digest in digests] or [-1] * len(values)
        return np.array(row_V, np.int64)[code_N]

    @property
    def decodes(self) -> bool:
        """Whether it has its decoder; `carvae export --share` takes that away."""
        return self.network.vae.decodes

    def refuse_without_decoder(self, what: str) -> None:
        """Raise BundleError where ``what`` cannot be had since the model was shared without its decoder."""
        if not self.decodes:
            raise BundleError(
                f"this model was shared without its decoder, which {what} needs; ask whoever trained it for the whole "
                "model"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """Label axes, the first being the one called state where there is one."""
        return () if self.tree is None else main_first(axis.name for axis in self.tree.axes)

    def save(self, path: Path | str) -> Path:
        """Write the bundle; the folder is replaced as a whole or not at all. Returns its path."""
        path = Path(path)
        check_place(path)
        with replacing_folder(path) as scratch:
            known = {} if self.trust is None else self.trust.tensors()
            known |= {} if self.responder is None else self.responder.tensors()
            (scratch / FILES[0]).write_bytes(serialise(_tensors(self.network) | known))  # readable as the umask says
            (scratch / FILES[1]).write_text(self.card, encoding="utf-8")
            (scratch / FILES[2]).write_text(json.dumps(self.metrics, indent=1, allow_nan=False), encoding="utf-8")
            text = json.dumps(self._describe(scratch), indent=1, allow_nan=False)
            own = hashlib.sha256(text.encode()).hexdigest()
            (scratch / "model.json").write_text(text.replace(NO_HASH, own, 1), encoding="utf-8")
        self.bundle_id = own[:12]
        return path

    def get_latent_representation(self, adata: AnnData) -> NDArray[np.float32]:
        """Latent means of the cells, [N, K]; ``adata`` is not changed."""
        return self._predict(adata, label=False).latent_NK

    def predict(self, adata: AnnData, axis: str | None = None, *, soft: bool = False) -> pd.Series[str] | pd.DataFrame:
        """State of each cell on a label axis (the first by default), or with ``soft`` the probability of every state.

        Raises
        ------
        BundleError
            The model has no labels, or no such axis.
        GeneError, CountsError
            The query does not fit; see `carvae.predict`.
        """
        if self.tree is None:
            raise BundleError("this model was trained without labels; it embeds but cannot predict states")
        labels = self.tree[axis or self.axes[0]]
        probability_NS = self._predict(adata, label=True).probability_NS[labels.name]
        probability = pd.DataFrame(probability_NS, index=adata.obs_names, columns=list(labels.leaves))
        return probability if soft else probability.idxmax(axis=1).astype(str)

    def align(self, resolved: ResolvedGenes, min_overlap: float) -> GeneAlignment:
        """How the genes of a query map onto the panel.

        Raises
        ------
        GeneError
            Fewer than ``min_overlap`` of the panel's genes are in the query.
        """
        alignment = align(resolved, self.genes)
        if alignment.receipt.overlap < min_overlap:
            raise GeneError(
                f"only {alignment.receipt.overlap:.1%} of the model's {len(self.genes)} genes are in the query, and "
                f"predict.min_overlap asks for {min_overlap:.1%}; give the unfiltered matrix, or a model trained on "
                "genes that your assay measures"
            )
        return alignment

    def _predict(self, adata: AnnData, *, label: bool) -> Prediction:
        try:
            return self._predict_source(open_source(adata, whole=False), label)
        except CountsError:  # not where the first cells pointed to: all places are looked through
            return self._predict_source(open_source(adata), label)

    def _predict_source(self, source: CountsSource, label: bool) -> Prediction:
        """One pass over the counts: each block is checked, brought to the panel and passed through the network."""
        resolved = GeneTable.default().resolve(source.genes, source.gene_ids)
        config = PredictConfig()
        alignment = self.align(resolved, config.min_overlap)
        parts, totals, prints, largest = [], [], [], 0
        for block in source.blocks(config.chunk_size):
            panel = alignment.apply(block.counts)
            parts.append(self.network.predict(panel, label=label, present_G=alignment.present))
            totals.append(block.total_N)
            prints.append(block.print_N)
            largest = max(largest, block.largest)
        source.confirmed(np.concatenate(totals), np.concatenate(prints), largest)
        return Prediction.joined(parts)

    def _describe(self, folder: Path) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sha256": NO_HASH,
            "files": {name: hash_of(folder / name) for name in FILES},
            "architecture": self.config.model_dump(mode="json"),
            "genes": list(self.genes),
            "tree": None if self.tree is None else self.tree.to_dict(),
            "signatures": self.signatures.to_dict(),
            "covariates": self.n_categories,
            "decoder": self.decodes,
            "mapped": {name: list(digests) for name, digests in self.mapped.items()},
            "gene_policy": list(self.gene_policy),
            "provenance": asdict(self.provenance),
            "trust": None if self.trust is None else self.trust.describe(),
            "response": None if self.responder is None else self.responder.describe(),
        }


def load(path: Path | str, device: str = "auto") -> Bundle:
    """Return the bundle in a folder, with every hash checked; nothing in it is executed.

    Raises
    ------
    BundleError
        The folder is no bundle, is incomplete, was changed, or was written by a newer carvae.
    """
    path = Path(os.path.expanduser(path))  # which leaves a user that is not there to be told of
    for _ in range(TRIES):
        before = stamps(path)
        try:
            return _load(path, device)
        except (BundleError, FileNotFoundError):
            if stamps(path) == before:
                raise
    raise BundleError(f"bundle {path} is being written again and again; wait until that is done")


def _load(path: Path, device: str) -> Bundle:
    spec, own_hash = read_description(path)
    try:
        whole = stamps(path)
        check_files(path, spec["files"])
        config = ModelConfig(**spec["architecture"])
        tree = None if spec["tree"] is None else LabelTree.from_dict(spec["tree"])
        weights = _checked(load_file(path / FILES[0]))
        if stamps(path) != whole:
            raise BundleError("it was replaced while it was read; read it again")
        known = {name: weights.pop(name) for name in [*weights] if name.startswith(PREFIX)}
        told = {name: weights.pop(name) for name in [*weights] if name.startswith(RESPONSE)}
        mapped = {str(name): tuple(map(str, digests)) for name, digests in spec.get("mapped", {}).items()}
        network = _network(weights, spec, mapped, tree, config)
        bundle = Bundle(
            network=network,
            trust=_trust(spec, known, config, tree),
            responder=Responder.read(spec["response"], told) if spec.get("response") else None,
            genes=tuple(spec["genes"]),
            tree=tree,
            signatures=Signatures.from_dict(spec["signatures"]),
            config=config,
            n_categories=dict(spec["covariates"]),
            gene_policy=tuple(spec["gene_policy"]),
            provenance=Provenance(**spec["provenance"]),
            metrics=read_metrics(path / "metrics.json"),
            card=(path / "card.md").read_text(encoding="utf-8"),
            bundle_id=own_hash[:12],
            mapped=mapped,
        )
    except BundleError as error:
        raise BundleError(f"bundle {path}: {error}") from None
    except (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        LabelError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"bundle {path} does not describe a model of this carvae ({reason}); retrain it") from None
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    bundle.network.to(target).eval()
    return bundle


def _trust(
    spec: dict[str, Any], known: dict[str, torch.Tensor], config: ModelConfig, tree: LabelTree | None
) -> Trust | None:
    if not spec.get("trust"):
        return None
    trust = Trust.read(spec["trust"], known)
    return trust.checked(len(spec["genes"]), config, tree, decodes=bool(spec.get("decoder", True)))


def _checked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"the weights {name!r} are not finite numbers of 32 bits; retrain the model")
    return weights


def _network(
    weights: dict[str, torch.Tensor],
    spec: dict[str, Any],
    mapped: dict[str, tuple[str, ...]],
    tree: LabelTree | None,
    config: ModelConfig,
) -> Network:
    """The network with these weights; its size is that of the weights before any memory is taken for it."""
    if config.n_layers > len(weights):
        raise BundleError(f"the model has {config.n_layers} layers and weights for fewer; retrain it")
    parts = {}
    for a, axis in enumerate(() if tree is None else tree.axes):
        parts[axis.name] = weights[f"head.axes.{a}.parts_SF"]
        if len(parts[axis.name]) != len(axis.leaves):
            raise BundleError(f"axis {axis.name!r} has {len(axis.leaves)} labels and weights for another number")
    decodes = bool(spec.get("decoder", True))
    with torch.device("meta"):
        network = Network(len(spec["genes"]), spec["covariates"], parts, config, decodes=decodes)
        if decodes:
            network.vae.decoder.add_rows({name: torch.empty(len(d), config.n_hidden) for name, d in mapped.items()})
    if spec["format"] < COMPLETES:
        nothing = Completion(len(weights["vae.encoder.first.weight_GH"]) if parts else 0).state_dict()
        gone = {"slope_KG", "centre_K"}  # layout 6 expected genes by the latent space; their means are kept
        kept = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[2] not in gone}
        weights = {"head.depth_power": torch.ones(())} | {f"head.completion.{k}": v for k, v in nothing.items()} | kept
    network.load_state_dict(weights, assign=True)
    return network


def _tensors(network: Network) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def leaf_parts(tree: LabelTree | None, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Label axis -> weight of each part in each leaf, for `Network`."""
    axes = () if tree is None else tree.axes
    return {axis.name: torch.from_numpy(axis.parts(1 - config.label_sharing)) for axis in axes}
