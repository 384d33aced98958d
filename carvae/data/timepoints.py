"""Time points in the words that studies use, in days from infusion and in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from carvae.errors import SchemaError

DAYS = {"d": 1.0, "day": 1.0, "w": 7.0, "wk": 7.0, "week": 7.0, "m": 30.4375, "mo": 30.4375, "month": 30.4375}
DAYS |= {"mon": 30.4375, "mth": 30.4375, "y": 365.25, "yr": 365.25, "year": 365.25}
APHERESIS, PRODUCT = -1e6, -0.5
"""Places in the order of what has no day: the product is made from the apheresis and given on day 0."""
_WORDS = {
    APHERESIS: "apheresis leukapheresis apher leuka starting_material baseline screening pre preinfusion".split(),
    PRODUCT: "product infusion_product ip prod infusionproduct drug_product dp gmp car_product manufactured".split(),
}
_WORD = {re.sub(r"[^a-z]", "", word): place for place, words in _WORDS.items() for word in words}
_UNIT = "|".join(sorted(DAYS, key=len, reverse=True))
_BEFORE = re.compile(rf"^(?:post|after)?({_UNIT})s?([+-]?\d+(?:\.\d+)?)$")
_AFTER = re.compile(rf"^([+-]?\d+(?:\.\d+)?)({_UNIT})s?(?:post|after)?(?:infusion)?$")
_DASHED = re.compile(rf"^(?:{_UNIT})s?-\d")
_NUMBER = re.compile(r"^[+-]?\d+(?:\.\d+)?$")


def place_of(word: str) -> float | None:
    """Where a time point stands: its day, or `APHERESIS` or `PRODUCT`; None where the word says neither.

    Examples
    --------
    >>> [place_of(word) for word in ("D28", "week 4", "M11.5", "3 months", "Infusion product", "relapse")]
    [28.0, 28.0, 350.03125, 91.3125, -0.5, None]
    """
    plain = re.sub(r"[\s_]", "", word.casefold())
    if (place := _WORD.get(re.sub(r"[^a-z]", "", plain))) is not None and not re.search(r"\d", plain):
        return place
    if _NUMBER.match(plain):
        return float(plain)
    if found := _BEFORE.match(plain):
        return float(found[2]) * DAYS[found[1]]
    if found := _AFTER.match(plain):
        return float(found[1]) * DAYS[found[2]]
    return None


def in_order(words: Sequence[str], order: Sequence[str] = ()) -> list[str]:
    """The time points from first to last: as ``order`` has them, else by what they say.

    Raises
    ------
    SchemaError
        ``order`` names a time point that is not there, or none is given and a time point says no time: so does
        ``Day-7`` where none is written without a dash, which may be no minus.
    """
    known = list(dict.fromkeys(words))
    if order:
        if absent := [word for word in order if word not in known]:
            raise SchemaError(
                f"clones.order names {absent[0]!r}, which is no time point here; they are {', '.join(sorted(known))}"
            )
        return list(order)
    place = {word: place_of(word) for word in known}
    dashed = {word for word in known if _DASHED.match(word.strip().casefold())}
    if not any(at is not None and at >= 0 and word not in dashed for word, at in place.items()):
        place |= dict.fromkeys(dashed)  # "Day-7" and "Day-28": minus, or a mere dash?
    if unclear := sorted(word for word, at in place.items() if at is None):
        raise SchemaError(
            f"it is not clear when {', '.join(map(repr, unclear[:5]))} was; give the order from first to last: "
            f"clones.order=[{', '.join(sorted(known))}]"
        )
    return sorted(known, key=lambda word: (place[word] or 0.0, word))
