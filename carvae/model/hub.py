"""A bundle as the folder of a Hugging Face repository, and back; nothing is sent anywhere.

The folder is the bundle as it is, with a README that the hub shows: what it knows of the model as fields, then the
model card. `carvae.load` and every ``--model`` take the folder itself, so a download needs no conversion.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from carvae.data.atomic import replacing_folder
from carvae.errors import BundleError, ConfigError, nearest
from carvae.model.bundle import Bundle, load
from carvae.model.bundle_files import FILES, check_outside, check_place

README = "README.md"
ATTRIBUTES = ".gitattributes"
LARGE = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
"""What the hub keeps in its store of large files."""
OTHER = "other"
LICENCES = (
    *"apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0".split(),
    *"bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda".split(),
    *"cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0".split(),
    *"cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0".split(),
    *"cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0".split(),
    *"etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c".split(),
    *"ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr".split(),
    *("unknown", OTHER),
)
"""Identifiers that the hub knows, without those of single language models
(https://huggingface.co/docs/hub/repositories-licenses)."""


def to_folder(model: Path, out: Path, licence: str, name: str) -> Path:
    """Write the folder of a repository from a bundle, and return it.

    Parameters
    ----------
    licence
        Of the model, as the training data allow it: an identifier of the hub (`LICENCES`) in any case.
    name
        What the model is called.

    Raises
    ------
    BundleError
        The model is no bundle, or the folder holds something else.
    ConfigError
        There is no such licence, or the folder is the model itself.
    """
    if (licence := licence.lower()) not in LICENCES:
        raise ConfigError(
            f"--licence {licence!r} is none that Hugging Face knows{nearest(licence, LICENCES)}; for any that is not "
            f"in https://huggingface.co/docs/hub/repositories-licenses say {OTHER!r}"
        )
    bundle = load(model, "cpu")
    check_place(out, (README, ATTRIBUTES))
    check_outside(out, model)
    with replacing_folder(out) as scratch:
        for file in ("model.json", *FILES):
            shutil.copyfile(model / file, scratch / file)
        (scratch / ATTRIBUTES).write_text(LARGE, encoding="utf-8")
        (scratch / README).write_text(readme(bundle, licence, name), encoding="utf-8")
    return out


def from_folder(folder: Path, out: Path) -> Path:
    """Write the bundle that a repository's folder holds, every hash checked, and return its path.

    Raises
    ------
    BundleError
        The folder holds no whole bundle, or ``out`` something else.
    """
    if (folder / "weights.safetensors").is_file() and (folder / "weights.safetensors").read_bytes()[:7] == b"version":
        raise BundleError(
            f"{folder} holds a pointer in the place of the weights: it was cloned without Git LFS; run `git lfs pull` "
            "there, or download it with huggingface_hub.snapshot_download"
        )
    load(folder, "cpu")
    check_place(out)
    with replacing_folder(out) as scratch:
        for file in ("model.json", *FILES):
            shutil.copyfile(folder / file, scratch / file)
    return out


def readme(bundle: Bundle, licence: str, name: str) -> str:
    """What the hub shows: its fields, how to use the model, and the model card."""
    fields: dict[str, Any] = {
        "license": licence,
        "library_name": "carvae",
        "tags": ["biology", "genomics", "single-cell", "CAR-T", "cell-state", "scvi-tools"],
        "model_name": name,
    }
    if licence == OTHER:
        fields |= {"license_name": "as-the-training-data-allow"}
    if results := _results(bundle):
        fields["model-index"] = [{"name": name, "results": results}]
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    usage = (
        "```python\nimport carvae\nfrom huggingface_hub import snapshot_download\n\n"
        'model = snapshot_download("OWNER/NAME")  # this repository\n'
        'adata = carvae.annotate(adata, model)  # raw counts in, states in adata.obs["carvae_state"]\n```\n'
    )
    return f"---\n{front}---\n\n# {name}\n\n{usage}\n{bundle.card}"


def _results(bundle: Bundle) -> list[dict[str, Any]]:
    """Scores on held-out patients, as the hub's model index has them."""
    found = []
    for axis, score in bundle.metrics.get("held_out", {}).items():
        metrics = [
            {"type": kind, "value": round(float(score[key]), 4), "name": f"{label}, {score['n_cells']} held-out cells"}
            for kind, key, label in (("accuracy", "accuracy", "accuracy"), ("f1", "macro_f1", "macro-F1"))
        ]
        task = {"type": "tabular-classification", "name": f"cell labelling, {axis}"}
        data = {"type": "single-cell-rna-seq", "name": "patients held out of the training studies"}
        found.append({"task": task, "dataset": data, "metrics": metrics})
    return found
