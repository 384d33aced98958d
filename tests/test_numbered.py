"""A page without names: what may be a date is numbered."""

from __future__ import annotations

import pytest

from carvae.page.numbered import SHORT_TIME


@pytest.mark.parametrize("time", ["D28", "day 28", "d-5", "week 104", "product", "IP", "M12", "pre infusion", "post+3"])
def test_time_points_that_are_no_dates_stay(time: str) -> None:
    assert SHORT_TIME.fullmatch(time)


@pytest.mark.parametrize(
    "time", ["Mar 2021", "May 21", "2021-03-05", "05.03.21", "day 2021", "march", "20210305", "5 Jun"]
)
def test_dates_are_numbered(time: str) -> None:
    assert not SHORT_TIME.fullmatch(time)
