"""What a gene is called: HGNC's approved symbols, previous symbols, aliases and Ensembl ids.

The packaged table is HGNC's (CC0, see ``tables/SOURCE.md``). Nothing is guessed: a name that could mean two genes is
left alone, and a name that the table does not know stays as it is, so that two studies which share it still match.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carvae.data.gene_policy import Names, is_transgene
from carvae.errors import GeneError

TABLES = Path(__file__).parent / "tables"

_ENSEMBL = re.compile(r"(?:^|[^A-Za-z0-9])(ENSG\d{11})(?!\d)")
_GENOME = re.compile(r"^(?:GRCh3[78]|hg19|hg38)[_-]+(?=.)")
_UNIQUE = re.compile(r"^(.+)[-.][1-9]\d?$")


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedGenes:
    """What each input column is, in the order of the input.

    Attributes
    ----------
    names
        The name that the study gave, one per column.
    symbols
        The approved symbol; where none is known the study's own name (of an Ensembl id: without its version).
    how
        ``ensembl`` (by id), ``symbol`` (an approved symbol), ``alias`` (an alias, a previous symbol or a spelling such
        as ``HLA.A`` or ``CD3E-1``), ``unknown``, or ``ambiguous`` (several genes bear the name; left alone).
    """

    names: NDArray[np.object_]
    symbols: NDArray[np.object_]
    how: NDArray[np.object_]


class GeneTable:
    """Approved symbols with their Ensembl ids, previous symbols and aliases.

    Parameters
    ----------
    by_id
        Ensembl gene id without version -> approved symbol.
    symbols
        All approved symbols.
    aliases
        Previous symbol or alias -> the approved symbol of the one gene that bears it.
    ambiguous
        Previous symbol or alias -> the approved symbols of the genes that bear it.
    """

    def __init__(
        self,
        by_id: Mapping[str, str],
        symbols: frozenset[str],
        aliases: Mapping[str, str],
        ambiguous: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.by_id = by_id
        self.symbols = symbols
        self.aliases = aliases
        self.ambiguous = ambiguous

    @classmethod
    def default(cls) -> GeneTable:
        """The table that ships with carvae, read once."""
        return _default_table()

    @classmethod
    def read(cls, path: str | Path) -> GeneTable:
        """The table in a TSV (gzipped or not) with the columns of HGNC's complete set, and carvae's T-cell aliases.

        Raises
        ------
        GeneError
            When the file cannot be read or lacks a column.
        """
        rows = _read_rows(Path(path))
        symbols = frozenset(row[0] for row in rows)
        aliases, ambiguous = _other_names(rows, symbols)
        for name, genes in _decided_names():
            known = sorted(symbols.intersection(genes))
            if name not in symbols and known:
                aliases[name] = known[0]
                ambiguous.pop(name, None)
                if len(known) > 1:
                    ambiguous[name] = tuple(known)
        aliases = {name: symbol for name, symbol in aliases.items() if name not in ambiguous}
        return cls({row[1]: row[0] for row in rows if row[1]}, symbols, aliases, ambiguous)

    def resolve(self, names: Names, ids: Names | None = None) -> ResolvedGenes:
        """Which gene each column is: a known id decides, then the approved symbol, then previous symbols and aliases.

        Parameters
        ----------
        names
            Symbols or Ensembl ids (a version suffix is ignored).
        ids
            Ensembl ids of the same columns, where the study has them; values that are none are passed over.

        Raises
        ------
        GeneError
            When ``ids`` is not as long as ``names``.
        """
        if ids is not None and len(ids) != len(names):
            raise GeneError(f"there are {len(names):,} gene names but {len(ids):,} gene ids; give one id per name")
        own = [str(name).strip() for name in names]
        given = set(own)
        pairs = [
            (name, "symbol") if not gene_id and name in self.symbols else self._gene(name, gene_id, given)
            for name, gene_id in zip(own, repeat("") if ids is None else ids, strict=False)
        ]
        return ResolvedGenes(
            names=_objects(own),
            symbols=_objects([pair[0] for pair in pairs]),
            how=_objects([pair[1] for pair in pairs]),
        )

    def _gene(self, name: str, gene_id: object, given: set[str]) -> tuple[str, str]:
        """The symbol of one column and how it was found."""
        for text in (gene_id, name):
            if isinstance(text, str) and "ENSG" in text and (found := _ENSEMBL.search(text)):
                if symbol := self.by_id.get(found[1]):
                    return symbol, "ensembl"
                if text is name and name.startswith("ENSG"):
                    return found[1], "unknown"
        plain = self._name(name)
        if plain is not None:
            return plain
        for spelling in self._spellings(name, given):
            if (other := self._name(spelling)) is not None and other[1] in {"symbol", "alias"}:
                return other[0], "alias"
        return name, "unknown"

    def _name(self, name: str) -> tuple[str, str] | None:
        """What the table says of exactly this name; None where it says nothing."""
        if name in self.symbols:
            return name, "symbol"
        if name not in self.aliases and name not in self.ambiguous:
            return None
        if is_transgene(name):  # CAR is an alias of CXADR, NR1I3 and others
            return name, "unknown"
        if name in self.aliases:
            return self.aliases[name], "alias"
        return name, "ambiguous"

    def _spellings(self, name: str, given: set[str]) -> list[str]:
        """Other ways in which software writes the same name, the surest first."""
        spellings = []
        if genome := _GENOME.match(name):
            spellings.append(name[genome.end() :])
        hyphened = name.replace(".", "-")  # R's make.names writes HLA.A
        if hyphened in self.symbols:
            spellings.append(hyphened)
        # var_names_make_unique numbers repeats; the base of an alias must stand beside it, for IL-2 is not a second IL
        if (numbered := _UNIQUE.match(name)) and (numbered[1] in self.symbols or numbered[1] in given):
            spellings.append(numbered[1])
        spellings.append(hyphened)
        return spellings


def _objects(values: list[str]) -> NDArray[np.object_]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


@cache
def _default_table() -> GeneTable:
    return GeneTable.read(TABLES / "hgnc.tsv.gz")


def _read_rows(path: Path) -> list[tuple[str, str, str, str]]:
    """Symbol, Ensembl id, previous symbols and aliases of each approved gene of a TSV."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise GeneError(f"the gene table {path} cannot be read ({error}); give HGNC's complete set as TSV") from error
    head, *lines = text.splitlines() or [""]
    columns = head.split("\t")
    wanted = ("symbol", "ensembl_gene_id", "prev_symbol", "alias_symbol")
    if missing := [name for name in wanted if name not in columns]:
        raise GeneError(f"the gene table {path} has no column {', '.join(missing)}; give HGNC's complete set as TSV")
    at = [columns.index(name) for name in wanted]
    status = columns.index("status") if "status" in columns else None
    cells = [line.split("\t") for line in lines if line]
    if short := [number for number, row in enumerate(cells, 2) if len(row) <= max(at)]:
        raise GeneError(f"the gene table {path} is cut off in line {short[0]}; download it again")
    return [
        (row[at[0]], row[at[1]], row[at[2]].strip('"'), row[at[3]].strip('"'))
        for row in cells
        if status is None or row[status] == "Approved"
    ]


def _decided_names() -> list[tuple[str, list[str]]]:
    """The names on which carvae decides, each with the symbol that it means, or with several where it means none."""
    lines = (TABLES / "decided_names.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(name, genes.split("|")) for name, genes in (line.split("\t") for line in lines)]


def _other_names(
    rows: list[tuple[str, str, str, str]], symbols: frozenset[str]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Previous symbols and aliases with the gene that bears each, and those that several genes bear.

    Names in mixed case (``Tim-3``, ``C1orf112``) are also known in capitals where nothing else bears these.
    """
    pairs = [(name, row[0]) for row in rows if row[2] or row[3] for name in f"{row[2]}|{row[3]}".split("|")]
    first, shared = _bearers(pairs, symbols.union([""]))
    mixed = [(name, name) for name in symbols if not name.isupper()]
    mixed += [(name, bearer) for name in first if not name.isupper() for bearer in shared.get(name, (first[name],))]
    first_capital, shared_capital = _bearers([(n.upper(), s) for n, s in mixed if n != n.upper()], symbols.union(first))
    return first | first_capital, shared | shared_capital


def _bearers(pairs: list[tuple[str, str]], taken: frozenset[str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Of the names that are not taken, the first gene of each, and all genes of those with several."""
    first: dict[str, str] = {}
    several: dict[str, set[str]] = {}
    for name, symbol in pairs:
        if name not in taken and first.setdefault(name, symbol) != symbol:
            several.setdefault(name, {first[name]}).add(symbol)
    return first, {name: tuple(sorted(genes)) for name, genes in several.items()}
