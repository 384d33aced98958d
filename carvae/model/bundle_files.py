"""The files of a bundle: which there are, whether they are whole and unchanged, and what may be replaced by one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from carvae.data.atomic import refuse_model
from carvae.errors import BundleError, ConfigError

FORMAT = 7
"""Version of the bundle's layout. Older layouts stay loadable; a newer one is refused by name."""
COMPLETES = 7
"""Layout from which on a model knows what genes that a query measured tell of those that it did not."""
FILES = ("weights.safetensors", "card.md", "metrics.json")
TEXTS = (".md", ".json")
NO_HASH = "0" * 64
MAX_TEXT = 16 * 1024**2
"""Bytes of model.json, card.md and metrics.json beyond which they are not read."""


def check_place(path: Path, beside: Iterable[str] = ()) -> None:
    """Raise BundleError where saving a bundle to ``path`` would take away anything but an older bundle.

    Parameters
    ----------
    beside
        Names of files that may be in the folder besides those of a bundle.
    """
    refuse_model(path, itself=False)
    if not path.exists():
        return
    if not path.is_dir():
        raise BundleError(f"{path} is a file, and a model is a folder; choose another output, nothing was touched")
    foreign = sorted({entry.name for entry in path.iterdir()} - {"model.json", *FILES, *beside})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise BundleError(
            f"{path} holds {foreign[0]!r}{more}, which is no part of a bundle; choose another output, or move "
            "that away; nothing there was touched"
        )


def check_outside(out: Path, model: Path | None) -> None:
    """Raise ConfigError where ``out`` is the model that a verb reads, or lies in it: a model stays as it is."""
    if model is not None and model.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"--out {str(out)!r} is the model itself or lies in it; choose another place")


def check_files(path: Path, hashes: dict[str, str]) -> None:
    """Raise BundleError unless the files are those that are named, each with its hash."""
    if set(hashes) != set(FILES):
        raise BundleError(f"model.json names {', '.join(sorted(hashes)) or 'no files'}, not {', '.join(sorted(FILES))}")
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise BundleError(f"{name!r} is missing; copy the whole folder again")
        if name.endswith(TEXTS) and (path / name).stat().st_size > MAX_TEXT:
            raise BundleError(f"{name!r} is larger than that of any model; copy the whole folder again")
        if hash_of(path / name) != expected:
            raise BundleError(f"{name!r} was changed after the model was saved; copy the folder again or retrain")


def hash_of(file: Path) -> str:
    """Hash of a file, which is never in memory as a whole."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is there twice is read in one way by one program and in another by the next."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def read_metrics(file: Path) -> dict[str, Any]:
    """The scores in metrics.json."""
    metrics = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object)
    if not isinstance(metrics, dict):
        raise BundleError("metrics.json holds no scores by name; retrain the model")
    return metrics


def read_description(path: Path) -> tuple[dict[str, Any], str]:
    """The content of model.json and its hash, checked."""
    file = path / "model.json"
    if not file.is_file():
        raise BundleError(f"{path} is no model bundle (no model.json in it); give the output folder of `carvae train`")
    if file.stat().st_size > MAX_TEXT:
        raise BundleError(f"{file} is larger than any model description; this is no carvae bundle")
    raw = file.read_bytes()
    try:
        spec = json.loads(raw, object_pairs_hook=_object)
        layout = spec["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        layout = None
    if not isinstance(layout, int):
        raise BundleError(
            f"{file} is no model description; the file was changed or is incomplete, copy the folder again"
        )
    if layout > FORMAT:
        raise BundleError(f"bundle {path} has layout {layout}, newer than {FORMAT}; upgrade carvae")
    stated = re.search(rb'"sha256": "([0-9a-f]{64})"', raw)
    if stated is None:
        raise BundleError(f"{file} bears no hash; the file was changed or is incomplete, copy the folder again")
    blank = raw[: stated.start(1)] + NO_HASH.encode() + raw[stated.end(1) :]
    own = stated.group(1).decode()
    if hashlib.sha256(blank).hexdigest() != own:
        raise BundleError(f"{file} was changed after the model was saved; copy the folder again or retrain")
    return spec, own


def stamps(path: Path) -> list[tuple[int, ...]]:
    """What tells whether the files of a bundle are still the same ones; a writer may replace the folder meanwhile."""
    found: list[tuple[int, ...]] = []
    for name in ("model.json", *FILES):
        with suppress(OSError):
            stat = (path / name).stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found
