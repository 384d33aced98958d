"""Patients with an outcome: one row per sample, read from tables and checked before anything is fitted.

Axes: R rows (samples), P patients, F features, L levels of the outcome.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from carvae.data.tables import read_table
from carvae.errors import SchemaError, join_problems
from carvae.section_respond import RespondConfig

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Bag = NDArray[np.float32]

ONE_STUDY = "all"
"""Name of the study of a table that names none."""
BESIDE = tuple(
    "sample patient study outcome event product disease tissue assay timepoint timepoint_days n_cells n_cells_used "
    "median_counts mean_confidence gene_overlap fraction_unknown mean_novelty batch_distance ambient_hint "
    "doublet_hint verdict verdict_reason clone_cells clone_depth model".split()
)
"""Columns of a table of samples that say how a sample was made and measured: never features unless named."""
LIMITS = re.compile(r"^(low|high) |_(low|high)$")
"""Ends of intervals: no features of their own."""
LATER = re.compile(
    r"(?i)(^|[^a-z])(response|responder|respond|outcome|progress\w*|relapse\w*|remission|recist|surviv\w*|pfs|os|efs|"
    r"dfs|ttp|death|dead|alive|best_?resp\w*|crs|icans|mrd|follow\w*up)([^a-z]|$)"
)
"""Names of columns that are known after the outcome only."""
MAX_DIGITS = 6
"""Significant digits to which two rows are compared."""
HALF, MIN_MEASURED = 0.5, 3
"""Rows are compared where at least three columns hold mostly fractions."""


@dataclass(frozen=True, slots=True, eq=False)
class Patients:
    """Samples of patients, with what is known of each patient's outcome."""

    sample_R: NDArray[np.object_]
    patient_R: NDArray[np.object_]
    study_R: NDArray[np.object_]
    outcome_R: Floats
    """Level of the outcome, or time to the event; the same for all samples of a patient; NaN where unknown."""
    columns: tuple[str, ...]
    """Names of the features."""
    x_RF: Floats
    """Features, NaN where missing."""
    beside: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """How the samples were made and measured: column -> numbers or words, [R] each."""
    event_R: NDArray[np.bool_] | None = None
    """For a time to an event: whether it was seen (not censored)."""
    bags: Mapping[str, tuple[Bag, ...]] = field(default_factory=dict)
    """Space -> cells of each sample in it, [cells, dimensions] each."""
    clones: tuple[frozenset[str], ...] | None = None
    """Clones of each sample, by their sequences."""
    set_aside: tuple[str, ...] = ()
    """Columns of numbers that are no features, since their names say that they are known after the outcome."""
    levels: tuple[str, ...] = ("0", "1")
    """Words of the levels, the worst first; empty for a time to an event."""

    @property
    def kind(self) -> str:
        """``time``, ``binary`` or ``ordinal``."""
        two = 2
        return "time" if self.event_R is not None else "binary" if len(self.levels) == two else "ordinal"

    @property
    def known(self) -> Rows:
        """Rows whose outcome is known."""
        return np.flatnonzero(~np.isnan(self.outcome_R))

    @property
    def names(self) -> NDArray[np.object_]:
        """Patients whose outcome is known, sorted."""
        return np.array(sorted(set(self.patient_R[self.known])), dtype=object)

    def of(self, columns: Sequence[str]) -> Floats:
        """Some of the features, [R, F]; raises SchemaError where one is not there."""
        if gone := [column for column in columns if column not in self.columns]:
            raise SchemaError(f"the table has no column {gone[0]!r}, which the prediction reads")
        return self.x_RF[:, [self.columns.index(column) for column in columns]]

    def first_rows(self, names: NDArray[np.object_]) -> Rows:
        """A row of each patient, from which what belongs to the patient is read."""
        place: dict[object, int] = {}
        for row, name in enumerate(self.patient_R):
            place.setdefault(name, row)
        return np.array([place[name] for name in names], np.int64)

    def take(self, rows: Rows) -> Patients:
        """Some of the rows."""
        return replace(
            self,
            sample_R=self.sample_R[rows],
            patient_R=self.patient_R[rows],
            study_R=self.study_R[rows],
            outcome_R=self.outcome_R[rows],
            x_RF=self.x_RF[rows],
            beside={name: column[rows] for name, column in self.beside.items()},
            event_R=None if self.event_R is None else self.event_R[rows],
            bags={space: tuple(bags[r] for r in rows) for space, bags in self.bags.items()},
            clones=None if self.clones is None else tuple(self.clones[r] for r in rows),
        )

    def shuffled(self, rng: np.random.Generator) -> Patients:
        """Outcomes dealt anew among the patients of each study; all else stays as it is."""
        names = self.names
        first = self.first_rows(names)
        study_P, source = self.study_R[first], first.copy()
        for study in sorted(set(study_P)):
            own = np.flatnonzero(study_P == study)
            source[own] = first[rng.permutation(own)]
        given = dict(zip(names, source, strict=True))
        rows = np.array([given.get(name, row) for row, name in enumerate(self.patient_R)], np.int64)
        event = None if self.event_R is None else self.event_R[rows]
        return replace(self, outcome_R=self.outcome_R[rows], event_R=event)


def read_patients(config: RespondConfig) -> Patients:
    """Read the table (and the clinical table beside it) that the settings name.

    Raises
    ------
    ReadError
        A file is not there, or is no table.
    SchemaError
        A column or word of the outcome is not there, or the table contradicts itself.
    """
    if config.table is None:
        raise SchemaError("respond.table names no file; give a CSV with one row per sample or patient")
    return patients_of(read_table(config.table, "respond.table", **_names(config)), config)


def patients_of(frame: pd.DataFrame, config: RespondConfig) -> Patients:
    """Patients from a table of samples in memory, as `read_patients`; the clinical table is read where one is named."""
    if config.clinical is not None:
        frame = _joined(frame, read_table(config.clinical, "respond.clinical", **_names(config)), config)
    for column, wanted in config.where.items():
        frame = frame[_text(_column(frame, column, "respond.where")).isin([wanted])]
    if frame.empty:
        raise SchemaError(f"no row of the table has {' and '.join(f'{k}={v}' for k, v in config.where.items())}")
    frame = frame.reset_index(drop=True)
    named: dict[str, pd.Series[str]] = {}
    for name, column in config.columns.items():
        named[str(name)] = _column(frame, column, f"respond.columns.{name}")
    named |= {name: frame[name] for name in BESIDE if name in frame and name not in named}
    patient = named.get("patient", named.get("sample"))
    if patient is None:
        raise SchemaError(f"the table has no column 'patient'; name it in respond.columns (there are {_some(frame)})")
    taken = set(config.columns.values()) | set(config.where)
    if "outcome" not in named and "response" in frame:
        named["outcome"] = frame["response"]
        taken.add("response")
    if "outcome" not in named:
        raise SchemaError(f"the table has no column 'outcome'; name it in respond.columns (there are {_some(frame)})")
    if (gone := int(patient.isna().sum())) > 0:
        raise SchemaError(f"{gone} rows have no patient; remove or name them, since outcomes belong to patients")
    outcome_R, event_R, levels = outcomes_of(named["outcome"], named.get("event"), config)
    study = _text(named["study"]).fillna("") if "study" in named else pd.Series([ONE_STUDY] * len(frame))
    beside = {n: _plain(s) for n, s in named.items() if n not in {"patient", "sample", "study", "outcome", "event"}}
    features, set_aside = _features(frame, taken, config)
    found = Patients(
        sample_R=_text(named.get("sample", patient)).to_numpy(dtype=object),
        patient_R=_text(patient).to_numpy(dtype=object),
        study_R=study.to_numpy(dtype=object),
        outcome_R=outcome_R,
        event_R=event_R,
        columns=tuple(map(str, features)),
        x_RF=features.to_numpy(float),
        beside=beside,
        set_aside=set_aside,
        levels=levels,
    )
    check_patients(found)
    return found


def _names(config: RespondConfig) -> dict[str, list[str]]:
    """Columns with names of samples and patients, as `read_table` takes them."""
    kinds = {"samples": "sample", "text": "patient"}
    return {kind: [config.columns[name]] for kind, name in kinds.items() if name in config.columns}


def outcomes_of(
    outcome: pd.Series[str], event: pd.Series[str] | None, config: RespondConfig
) -> tuple[Floats, NDArray[np.bool_] | None, tuple[str, ...]]:
    """Levels (or times) of a column of outcomes, whether an event was seen, and the words of the levels.

    Raises
    ------
    SchemaError
        A word is in no level, or a time is no positive number. Words are never merged silently.
    """
    if event is not None:
        time = pd.to_numeric(outcome, errors="coerce")
        if (time.isna() & outcome.notna()).any() or (time <= 0).any():
            raise SchemaError("with respond.columns.event the outcome is a time: every value must be a positive number")
        seen = _text(event).map({"1": True, "0": False, "True": True, "False": False})
        if seen[time.notna()].isna().any():
            raise SchemaError("the column of respond.columns.event must hold 0 (censored) and 1 (event) alone")
        return time.to_numpy(float), seen.fillna(False).to_numpy(bool), ()
    level_of = {word: float(n) for n, words in enumerate(config.levels) for word in words}
    words = _text(outcome)
    words = words.mask(words.isin(["", "NA", "nan", *config.missing]))
    if unknown := sorted(set(words.dropna()) - set(level_of)):
        raise SchemaError(
            f"the outcome has the values {', '.join(map(repr, sorted(set(words.dropna()))))}, and respond.levels does "
            f"not say what {unknown[0]!r} is; give all of them from worst to best, such as [[SD, PD], [CR]], or name "
            "it in respond.missing"
        )
    return np.asarray(words.map(level_of), np.float64), None, tuple("/".join(words) for words in config.levels)


def check_patients(found: Patients) -> None:
    """Raise SchemaError, with all problems at once, where a table contradicts itself or tells a patient twice."""
    frame = pd.DataFrame({"patient": found.patient_R, "study": found.study_R, "outcome": found.outcome_R})
    if found.event_R is not None:
        frame["outcome"] = frame["outcome"].astype(str) + " " + pd.Series(found.event_R).astype(str)
    problems = []
    by_patient = frame.groupby("patient", sort=True)
    for name in by_patient["outcome"].nunique(dropna=False).loc[lambda n: n > 1].index[:3]:
        values = by_patient.get_group(name)["outcome"]
        said = sorted({"missing" if v != v else _word(v, found.levels) for v in values})  # noqa: PLR0124 (NaN)
        problems.append(f"patient {name!r} has the outcomes {' and '.join(said)}; an outcome belongs to a patient")
    for name in by_patient["study"].nunique().loc[lambda n: n > 1].index[:3]:
        problems.append(f"patient {name!r} is in several studies; give each person one name in one study")
    plain: dict[str, set[str]] = {}
    for name in set(found.patient_R):
        plain.setdefault(re.sub(r"[\W_]+", "", str(name)).lower(), set()).add(str(name))
    for names in sorted(map(sorted, (n for n in plain.values() if len(n) > 1)))[:3]:
        problems.append(f"{' and '.join(map(repr, names))} look like one patient written twice; give it one name")
    problems += _told_twice(found)
    if problems:
        raise SchemaError(join_problems("the table of patients cannot be used", problems))


def _told_twice(found: Patients) -> list[str]:
    """Rows, cells and clones that two patients share: no split could keep them apart."""
    problems = []
    known = ~np.isnan(found.x_RF)
    fractions = (known & (found.x_RF % 1 != 0)).sum(0)
    measured = fractions > HALF * known.sum(0)  # counts and flags agree by chance
    told = known[:, measured].sum(1) >= MIN_MEASURED  # samples of which nothing was measured are alike, and no copies
    rows = ["|".join(f"{v:.{MAX_DIGITS}g}" for v in row) for row in found.x_RF[told][:, measured]]
    problems += _shared(zip(rows, found.patient_R[told], strict=True), "has the same features as")
    for space, bags in found.bags.items():
        cells = ((cell.tobytes(), name) for bag, name in zip(bags, found.patient_R, strict=True) for cell in bag)
        problems += _shared(cells, f"shares cells (same coordinates in {space!r}) with")
    if found.clones is not None:
        pairs = ((clone, n) for clones, n in zip(found.clones, found.patient_R, strict=True) for clone in clones)
        problems += _shared(pairs, "shares clones (same sequences) with")
    return problems


def _shared(items: object, what: str) -> list[str]:
    owner: dict[object, object] = {}
    met: dict[tuple[str, str], int] = {}
    for key, name in items:  # type: ignore[attr-defined]
        other = owner.setdefault(key, name)
        if other != name:
            pair = (str(other), str(name))
            met[pair] = met.get(pair, 0) + 1
    return [
        f"patient {b!r} {what} patient {a!r} ({n} in common); one of them is a copy, and would sit on both sides of a "
        "split"
        for (a, b), n in [*met.items()][:3]
    ]


def _features(frame: pd.DataFrame, taken: set[str], config: RespondConfig) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The numbers that may predict, and those that would but for their names."""
    later: list[str] = []
    if config.score is not None:
        wanted: Sequence[str] = [config.score]
    elif config.features:
        wanted = config.features
    else:
        numbers = [str(c) for c in frame.select_dtypes(["number", "bool"]) if c not in taken and c not in BESIDE]
        numbers = [name for name in numbers if not LIMITS.search(name)]
        later = [name for name in numbers if LATER.search(name) and name not in config.trusted]
        wanted = [name for name in numbers if name not in later]
    for name in wanted:
        column = _column(frame, name, "respond.features")
        if not pd.api.types.is_numeric_dtype(column):
            raise SchemaError(f"the feature {name!r} is not a column of numbers")
        if name in config.columns.values() or (LATER.search(name) and name not in config.trusted):
            raise SchemaError(
                f"the feature {name!r} is the outcome or, by its name, known after it only; a response is predicted "
                "from what was measured before (name it in respond.trusted if its name deceives)"
            )
        if np.isinf(column.astype(float)).any():
            raise SchemaError(f"the feature {name!r} holds infinite values")
    found = frame[list(wanted)].astype(float)
    empty = [str(c) for c in found if found[c].nunique() == 0]
    return found.drop(columns=empty), tuple(later)


def _joined(frame: pd.DataFrame, clinical: pd.DataFrame, config: RespondConfig) -> pd.DataFrame:
    """The table with the columns of the clinical one, by the first of sample and patient that both have."""
    table = config.table or "the studies"
    for name in ("sample", "patient"):
        key = config.columns.get(name, name)
        if key in frame and key in clinical:
            if clinical[key].duplicated().any():
                raise SchemaError(f"{config.clinical} has several rows for one {key!r}; give one")
            new = [key, *(c for c in clinical if c not in frame)]
            left = frame.assign(**{key: _text(frame[key])})
            right = clinical[new].assign(**{key: _text(clinical[key])})
            met = left[key].isin(right[key].dropna())
            if not met.any():
                looks = f"there they look like {right[key].iloc[0]!r}, here like {left[key].iloc[0]!r}"
                raise SchemaError(f"no {key} of {table} is in {config.clinical}: {looks}; write them alike")
            if not met.all():
                log.warning("%s of %s rows of %s have no row in %s", (~met).sum(), len(met), table, config.clinical)
            return left.merge(right, on=key, how="left")
    raise SchemaError(
        f"{table} and {config.clinical} have neither 'sample' nor 'patient' in common; {config.clinical} has "
        f"{_some(clinical)}: call the column alike in both, or name it in respond.columns"
    )


def _column(frame: pd.DataFrame, column: str, where: str) -> pd.Series[str]:
    if column not in frame:
        raise SchemaError(f"{where} names the column {column!r}, which is not there (there are {_some(frame)})")
    found: pd.Series[str] = frame[column]
    return found


def _text(column: pd.Series[str]) -> pd.Series[str]:
    """Values as words; whole numbers without a point; missing ones stay missing."""
    whole = pd.api.types.is_float_dtype(column) and bool((column.dropna() % 1 == 0).all())
    words = column.astype("Int64").astype("string") if whole else column.astype("string")
    return words.str.strip().astype(object).where(column.notna(), np.nan)


def _plain(column: pd.Series[str]) -> NDArray[Any]:
    """Numbers as they are, all else as words, empty where missing."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(float)
    return _text(column).fillna("").to_numpy(dtype=str)


def _word(value: object, levels: tuple[str, ...]) -> str:
    return levels[int(value)] if levels and isinstance(value, float) else str(value)


def _some(frame: pd.DataFrame) -> str:
    most = 12
    names = [str(c) for c in frame]
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
