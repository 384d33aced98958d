"""One colour per state, the same in every figure, page and file; told apart by colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe & Ito 2008 (jfly.uni-koeln.de/color), with brown for black, which a dark page would swallow.
EIGHT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A5C3E")
# M. Krzywinski's 12 colours for deuteranopia, protanopia and tritanopia (mk.bcgsc.ca/colorblind).
TWELVE_COLOURS = (
    "#9F0162", "#009F81", "#FF5AAF", "#00FCCF", "#8400CD", "#008DF9",
    "#00C2F9", "#FFB2FD", "#A40122", "#E20134", "#FF6E3A", "#FFC33B",
)  # fmt: skip
GREY = "#B5B5B5"
"""Of what has no state, and of lines that guide the eye."""
DARK_GREY = "#333333"
"""Of what others are compared with."""


def colours(states: Sequence[str]) -> list[str]:
    """The colour of each state, in the order of its axis; more states than colours share them in turn."""
    chosen = EIGHT_COLOURS if len(states) <= len(EIGHT_COLOURS) else TWELVE_COLOURS
    return [chosen[i % len(chosen)] for i in range(len(states))]
