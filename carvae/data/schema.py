"""The contract that every study's ``obs`` is brought to: study, sample, patient, and what else is known of a cell.

A column is taken from the caller's mapping, else from a constant, else from a column that bears the contract's own
name, else from the one column that bears a customary other name (CELLxGENE ``donor_id``, Seurat ``orig.ident``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from carvae.data.values import texts
from carvae.errors import SchemaError, join_problems

MISSING_WORDS = frozenset({"", "na", "n/a", "nan", "none", "null", "<na>", "nat"})
UNKNOWN_WORDS = MISSING_WORDS | {"unknown"}
NO_SAMPLE = frozenset({"", "unknown"})
"""A text in the column of samples is a name, ``NA`` as well (which is told): missing is what is really empty."""
NAMELESS = "unknown sample"
REQUIRED = ("study", "sample", "patient")
MANY_CELLS = 50
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Column:
    """One name of the contract."""

    name: str
    kind: Literal["text", "number", "count"] = "text"
    aliases: tuple[str, ...] = ()
    per_patient: bool = False
    """The same for all cells of a patient."""


CONTRACT: tuple[Column, ...] = (
    Column("study"),
    Column("sample", aliases=("sample_id", "orig.ident", "library_id", "batch")),
    Column("patient", aliases=("donor_id", "patient_id", "donor", "subject_id", "subject", "individual")),
    Column("timepoint"),
    Column("timepoint_days", "number"),
    Column("tissue"),
    Column("product"),
    Column("assay"),
    Column("disease"),
    Column("clone_id", aliases=("clonotype",)),
    Column("clone_size", "count", aliases=("clone_id_size",)),
    Column("response", per_patient=True),
    Column("response_timepoint", per_patient=True),
)
NAMES = tuple(column.name for column in CONTRACT)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing in a study's ``obs`` that breaks the contract."""

    study: str
    column: str
    count: int
    """Cells (or values) concerned."""
    what: str
    remedy: str

    def sentence(self) -> str:
        """The problem for a person."""
        return f"study {self.study!r}, column {self.column!r}: {self.what} ({self.count:,}); {self.remedy}"


@dataclass(frozen=True, slots=True)
class Harmonised:
    """A study's ``obs`` in the names and types of the contract, with what was wrong and what was assumed."""

    study: str
    obs: pd.DataFrame
    """The contract's columns that are known, indexed like the caller's ``obs``: text as ``category``, numbers as
    ``float64`` with NaN for missing."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def harmonise(
    obs: pd.DataFrame,
    study: str,
    obs_map: Mapping[str, str],
    constants: Mapping[str, str],
    *,
    require: Sequence[str] = REQUIRED,
) -> pd.DataFrame:
    """The study's ``obs`` in the names and types of the contract; :func:`inspect_obs` also returns the notes.

    Raises
    ------
    SchemaError
        Naming every problem at once.
    """
    found = inspect_obs(obs, study, obs_map, constants, require=require)
    raise_problems(found.problems)
    return found.obs


def inspect_obs(
    obs: pd.DataFrame,
    study: str,
    obs_map: Mapping[str, str],
    constants: Mapping[str, str],
    *,
    require: Sequence[str] = REQUIRED,
) -> Harmonised:
    """The study's ``obs`` in the contract's terms, with all problems found instead of an error.

    Parameters
    ----------
    obs
        One row per cell; never changed.
    study
        Name of the study; empty if ``obs`` has a column of that name.
    obs_map
        Contract name -> column of ``obs``.
    constants
        Contract name -> one value for all cells.
    require
        Contract names that must be there for every cell. Empty for a query: ``sample`` is then the study's name
        where nothing better is known, and a column that the caller did not map is left out, with a note, when it
        is broken.
    """
    work = _Harmoniser(obs, study, obs_map, constants, tuple(require))
    return work.run()


def query_samples(
    obs: pd.DataFrame, name: str, column: str | None = None
) -> tuple[np.ndarray[Any, np.dtype[np.object_]], tuple[str, ...]]:
    """The sample of each cell of a query, and notes on how it was found; see `query_obs`, which raises the same."""
    found, notes = query_obs(obs, name, {"sample": column} if column else {})
    return found["sample"].to_numpy(dtype=object), tuple(note for note in notes if "sample" in note)


def query_obs(obs: pd.DataFrame, name: str, obs_map: Mapping[str, str]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """What the contract knows of each cell of a query, and notes on how it was found.

    The sample is taken from the caller's column where given, else from the contract's or a customary column; ``name``
    for all cells where there is none, and "unknown sample" where a cell has none. A study is there only where ``obs``
    names it.

    Raises
    ------
    SchemaError
        ``obs`` has no such column, or it cannot be used.
    """
    found = inspect_obs(obs, name, obs_map, {}, require=())
    raise_problems(found.problems)
    table = found.obs.drop(columns="study", errors="ignore")
    if named_column([str(own) for own in obs.columns], "study"):
        table["study"] = obs[named_column([str(own) for own in obs.columns], "study")[0]].astype("string")
    sample = table["sample"].astype("string") if "sample" in table else pd.Series(name, index=obs.index, dtype="string")
    notes, n_none = found.notes, int(sample.isna().sum())
    if n_none:
        notes += (f"study {name!r}: {n_none:,} cells have no sample; together they are taken as {NAMELESS!r}",)
    table["sample"] = sample.fillna(NAMELESS).astype(object)
    return table, notes


def check_studies(studies: Sequence[Harmonised]) -> None:
    """Refuse studies that break the contract, each alone or together.

    Raises
    ------
    SchemaError
        With every problem of every study; across studies: a study named twice, and a patient or a sample that
        occurs in two studies.
    """
    problems = [problem for study in studies for problem in study.problems]
    for column in ("patient", "sample"):
        problems += _shared(studies, column)
    names = [study.study for study in studies if study.study]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(name, "study", names.count(name), "the name is used twice", "give each its own name"))
    raise_problems(problems)


def contract_columns(columns: Sequence[str]) -> list[str]:
    """The columns that can be any of the contract's."""
    found = [own for column in CONTRACT for own in named_column(columns, column.name)]
    return list(dict.fromkeys(found))


def named_column(columns: Sequence[str], name: str) -> list[str]:
    """The columns that can be the contract's ``name``: the one that bears it, else all with a customary name."""
    if name in columns:
        return [name]
    column = next(column for column in CONTRACT if column.name == name)
    customary = {alias.casefold() for alias in (column.name, *column.aliases)}
    return [str(own) for own in columns if str(own).casefold() in customary]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one :class:`SchemaError` for all problems; nothing if there is none."""
    if problems:
        raise SchemaError(join_problems("obs does not meet the data contract", [p.sentence() for p in problems]))


class _Harmoniser:
    """One study on its way to the contract."""

    def __init__(
        self,
        obs: pd.DataFrame,
        study: str,
        obs_map: Mapping[str, str],
        constants: Mapping[str, str],
        require: tuple[str, ...],
    ) -> None:
        self.obs, self.study, self.require = obs, study.strip(), require
        self.obs_map, self.constants = obs_map, constants
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def run(self) -> Harmonised:
        self._check_names()
        out = pd.DataFrame(index=self.obs.index)
        for column in CONTRACT:
            values = self._column(column)
            if values is not None:
                out[column.name] = values
        self._check_levels(out)
        return Harmonised(self.study, out, tuple(self.problems), tuple(self.notes))

    def _add(self, column: str, count: int, what: str, remedy: str) -> None:
        """A problem, or for a query a note if the caller did not ask for the column."""
        problem = Problem(self.study, column, count, what, remedy)
        if self.require or column in self.obs_map or column in self.constants:
            self.problems.append(problem)
        else:
            self.notes.append(f"{problem.sentence()}; the column is left out")

    def _check_names(self) -> None:
        for section, given in (("obs", self.obs_map), ("constants", self.constants)):
            for name in given:
                if name not in NAMES:
                    remedy = f"{_nearest(name, NAMES)}the contract's names are {', '.join(NAMES)}"
                    self._add(name, 1, f"`{section}:` names a column that is not in the contract", remedy)
        for name in sorted(set(self.obs_map) & set(self.constants) & set(NAMES)):
            self._add(name, 1, "is given both under `obs:` and under `constants:`", "keep one of them")

    def _column(self, column: Column) -> pd.Series[Any] | None:
        name = column.name
        if name in self.constants and name not in self.obs_map:
            return self._typed(column, pd.Series(self.constants[name], index=self.obs.index, dtype=object), name)
        if name in self.obs_map:
            source: str | None = self.obs_map[name]
            if source not in self.obs:
                columns = list(map(str, self.obs.columns))
                remedy = f"{_nearest(str(source), columns)}the file has {', '.join(columns) or 'no columns'}"
                self._add(name, len(self.obs), f"`obs:` maps it to {source!r}, which is missing", remedy)
                return None
        elif name == "study" and self.study:
            source = None
        else:
            source = self._customary(column)
        if source is not None:
            return self._typed(column, self.obs[source], source)
        return self._default(column)

    def _default(self, column: Column) -> pd.Series[Any] | None:
        name = column.name
        if name == "study" and self.study:
            own = self.obs["study"].nunique() if "study" in self.obs else 0
            if own > 1:
                self.notes.append(
                    f"obs['study'] has {own} values, but all cells are taken as study {self.study!r}; "
                    "map `study: study` to use the column"
                )
            return self._whole_study(self.study)
        if name == "sample" and name not in self.require and self.study:
            self.notes.append(f"obs names no sample: all cells are taken as sample {self.study!r}")
            return self._whole_study(self.study)
        if name in self.require:
            remedy = f"map it (`obs: {{{name}: COLUMN}}`) or give one value (`constants: {{{name}: VALUE}}`)"
            if name == "study":
                remedy = "name the study"
            if not any(p.column == name for p in self.problems):
                self._add(name, len(self.obs), "is missing", remedy)
        return None

    def _whole_study(self, value: str) -> pd.Series[Any]:
        return pd.Series(pd.Categorical([value] * len(self.obs)), index=self.obs.index)

    def _customary(self, column: Column) -> str | None:
        """The column that bears the contract's name, else the only one that bears another customary name."""
        found = named_column([str(c) for c in self.obs.columns], column.name)
        if found == [column.name]:
            return column.name
        if len(found) > 1:
            what, remedy = f"could be any of {', '.join(found)}", f"map one (`obs: {{{column.name}: {found[0]}}}`)"
            self._add(column.name, len(self.obs), what, remedy)
        if len(found) != 1:
            return None
        self.notes.append(f"study {self.study!r}: {column.name} is taken from obs[{found[0]!r}]")
        return found[0]

    def _typed(self, column: Column, values: pd.Series[Any], source: str) -> pd.Series[Any] | None:
        missing_words = UNKNOWN_WORDS if column.name in REQUIRED else MISSING_WORDS
        found = texts(values, NO_SAMPLE if column.name == "sample" else missing_words)
        codes, labels = found.code_N, found.labels
        if column.name == "sample":
            self._note_odd_names(codes, labels, source)
        if column.name in REQUIRED and found.merged:
            more = f", and {len(found.merged) - 1} more" if found.merged[1:] else ""
            what = f"obs[{source!r}] writes {found.merged[0]!r}{more} with other spaces around it too"
            self.notes.append(f"study {self.study!r}: {what}, which is taken as one {column.name}")
        needed = column.name in self.require
        if needed and (codes < 0).any():
            from_ = "" if source == column.name else f" in obs[{source!r}]"
            self._add(column.name, int((codes < 0).sum()), f"has missing values{from_}", "fill them or drop the cells")
        if column.kind == "text":
            if not len(labels):
                return None
            return pd.Series(pd.Categorical.from_codes(codes, pd.Index(labels, dtype=object)), index=self.obs.index)
        numbers = pd.to_numeric(pd.Series(labels, dtype=object), errors="coerce").to_numpy(np.float64)
        wrong = ~np.isfinite(numbers)
        if column.kind == "count":
            wrong |= (numbers < 0) | (numbers != np.rint(numbers))
        if wrong.any():
            cells = int(np.isin(codes, np.flatnonzero(wrong)).sum())
            shown = ", ".join(repr(label) for label in np.asarray(labels, object)[wrong][:SHOWN])
            kind = "a whole number" if column.kind == "count" else "a number"
            self._add(column.name, cells, f"is not {kind}: {shown}", "map a column of numbers, or leave it out")
            return None
        return pd.Series(np.append(numbers, np.nan)[codes], index=self.obs.index)

    def _note_odd_names(self, codes: np.ndarray[Any, np.dtype[np.intp]], labels: list[str], source: str) -> None:
        if odd := [code for code, label in enumerate(labels) if label.casefold() in MISSING_WORDS]:
            words = f"{', '.join(repr(labels[code]) for code in odd)} ({int(np.isin(codes, odd).sum()):,})"
            what = f"study {self.study!r}: obs[{source!r}] holds {words}, taken as a name of a sample"
            self.notes.append(f"{what}; where it means none, leave these cells of the table empty")

    def _check_levels(self, out: pd.DataFrame) -> None:
        """A sample has one patient and one study; what belongs to a patient is the same in all its cells."""
        if "sample" in self.require and len(out) >= MANY_CELLS and "sample" in out:
            n_samples = out["sample"].nunique()
            if n_samples > len(out) / 2:
                what = f"names {n_samples:,} samples for {len(out):,} cells: it tells cells apart, not samples"
                self._add("sample", len(out), what, "map the column that says from which specimen a cell is")
        checks = [("sample", "patient"), ("sample", "study"), ("patient", "study")]
        checks += [("patient", column.name) for column in CONTRACT if column.per_patient]
        for level, column in checks:
            if not {level, column} <= set(out.columns):
                continue
            values = out[[level, column]].dropna().groupby(level, observed=True)[column].unique()
            mixed = values[[len(found) > 1 for found in values]]
            if not len(mixed):
                continue
            first = ", ".join(repr(value) for value in list(mixed.iloc[0])[:SHOWN])
            what = f"{len(mixed):,} {level}(s) have more than one {column}, for example {mixed.index[0]!r}: {first}"
            remedy = "name samples by patient, time point and tissue" if level == "sample" else "keep one of them"
            if column == "study":
                remedy = f"give every study its own {level} names"
            self._add(column, int(out[level].isin(mixed.index).sum()), what, remedy)
            if not self.require and column not in self.obs_map:
                del out[column]


def _nearest(name: str, among: Sequence[str]) -> str:
    return "".join(f"did you mean {close!r}? " for close in difflib.get_close_matches(name, among, n=1))


def _shared(studies: Sequence[Harmonised], column: str) -> list[Problem]:
    """One problem for each set of studies that have values of the column in common."""
    cells: dict[str, dict[str, int]] = {}
    for study in studies:
        if {"study", column} <= set(study.obs.columns):
            pairs = study.obs.groupby(["study", column], observed=True).size().reset_index(name="count")
            for home, value, count in zip(pairs["study"], pairs[column], pairs["count"], strict=True):
                homes = cells.setdefault(str(value), {})
                homes[str(home)] = homes.get(str(home), 0) + int(count)
    values: dict[tuple[str, ...], list[str]] = {}
    for value, homes in cells.items():
        if len(homes) > 1:
            values.setdefault(tuple(sorted(homes)), []).append(value)
    remedy = f"give every study its own {column} names, or give these cells as one study"
    problems = []
    for where, shared in values.items():
        what = f"{len(shared):,} {column}(s) occur in {len(where)} studies, for example {shared[0]!r}"
        problems.append(Problem(" + ".join(where), column, sum(sum(cells[v].values()) for v in shared), what, remedy))
    return problems
