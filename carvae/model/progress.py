"""How fast a run goes and how long it will take, in words."""

from __future__ import annotations

from dataclasses import dataclass

MINUTE, HOUR = 60, 3600
FEW = 2
"""Of a unit, below which the smaller one is used."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A run of some steps, of which some were done when the clock was started."""

    n_steps: int
    cells_per_step: float
    first: int
    """Steps that were done before."""
    begun: float
    """Seconds on the clock at that time."""

    def said(self, done: int, now: float) -> str:
        """Rate and time left after ``done`` steps, at ``now`` seconds; empty before anything can be said."""
        steps, seconds = done - self.first, now - self.begun
        if steps <= 0 or seconds <= 0:
            return ""
        left = (self.n_steps - done) * seconds / steps
        return f"{steps * self.cells_per_step / seconds:,.0f} cells/s, at most {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds >= FEW * HOUR:
        return f"{seconds / HOUR:.1f} hours"
    return f"{seconds / MINUTE:.0f} minutes" if seconds >= FEW * MINUTE else f"{max(1, round(seconds))} s"
