"""Time points in the words of studies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carvae.data.timepoints import APHERESIS, PRODUCT, in_order, place_of
from carvae.errors import SchemaError


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("Infusion product|IP|PROD|product|GMP|infusion_product", PRODUCT),
        ("Apheresis|leukapheresis|baseline|pre-infusion|Pre", APHERESIS),
        ("D28|day 28|Day28|d+28|28|28 days|28d|week 4|Wk4|4 weeks|W4", 28.0),
        ("M1|M01|month 1|1 month|mo1|1M", 30.4375),
        ("M11.5", 11.5 * 30.4375),
        ("Y2|2 years", 730.5),
        ("D-7|day -7", -7.0),
    ],
)
def test_words_of_studies_are_understood(words: str, place: float) -> None:
    for word in words.split("|"):
        assert place_of(word) == pytest.approx(place), word


@pytest.mark.parametrize("word", ["relapse", "early", "M", "T1", "responder", "", "CD19", "product 2"])
def test_words_that_say_no_time_are_not_guessed(word: str) -> None:
    assert place_of(word) is None


@given(st.permutations(["apheresis", "product", "M0", "D7", "D28", "M3", "M11.5", "Y5"]))
def test_the_order_is_that_of_time(words: list[str]) -> None:
    assert in_order(words) == ["apheresis", "product", "M0", "D7", "D28", "M3", "M11.5", "Y5"]


def test_an_order_that_is_given_holds_and_may_leave_out() -> None:
    assert in_order(["late", "early", "mid"], ["early", "late"]) == ["early", "late"]
    with pytest.raises(SchemaError, match=r"clones\.order names 'lat', .* early, late"):
        in_order(["late", "early"], ["early", "lat"])
    with pytest.raises(SchemaError, match=r"it is not clear when 'relapse' was; .*clones\.order=\["):
        in_order(["D7", "relapse"])


def test_a_dash_that_may_be_no_minus_is_not_guessed() -> None:
    with pytest.raises(SchemaError, match=r"it is not clear when 'Day-28', 'Day-7' was; .*clones\.order=\["):
        in_order(["product", "Day-7", "Day-28"])
    assert in_order(["D28", "product", "D-5"]) == ["D-5", "product", "D28"], "28 has no dash, so that 5 has a minus"
    assert in_order(["D-5", "D0"]) == ["D-5", "D0"]
    assert in_order(["Day -5", "Day -30"]) == ["Day -30", "Day -5"]
