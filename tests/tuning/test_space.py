"""The search space as it is written on a command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from jaxrec.tuning.space import Choice, Range, parse_space

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


def test_ranges_and_choices_are_told_apart():
    space = parse_space(
        [
            "--search.a.b=1e-4..1e-2:log",
            "--search.n=1..4",
            "--search.s=cosine, constant",
            "--search.x=-1..0.5",
        ]
    )
    assert space == {
        "a.b": Range(1e-4, 1e-2, True, False),
        "n": Range(1, 4, False, True),
        "s": Choice(("cosine", "constant")),
        "x": Range(-1, 0.5, False, False),
    }
    assert space["n"].suggest(FixedTrial({"n": 3}), "n") == "3"
    assert space["a.b"].suggest(FixedTrial({"a.b": 1e-3}), "a.b") == "0.001"


@given(FINITE, FINITE)
def test_a_range_reads_back_what_was_written(low, high):
    text = [f"--search.x={low!r}..{high!r}"]
    if low < high:
        assert parse_space(text) == {"x": Range(low, high, False, False)}
    else:
        with pytest.raises(ValueError, match="LOW < HIGH"):
            parse_space(text)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("--search.x", "says no search"),
        ("--search.=1..2", "says no search"),
        ("--search.x=1..2:cube", "'cube' is no scale"),
        ("--search.x=a..2", "must be numbers"),
        ("--search.x=1..inf", "finite ends"),
        ("--search.x=nan..1", "finite ends"),
        ("--search.x=0..1:log", "0 < LOW < HIGH"),
        ("--search.x=5", "two or more different values"),
        ("--search.x=a,,b", "two or more different values"),
        ("--search.x=a,a", "two or more different values"),
    ],
)
def test_what_is_wrong_is_named(argument, problem):
    with pytest.raises(ValueError, match=problem):
        parse_space([argument])


def test_a_field_is_searched_once():
    with pytest.raises(ValueError, match="x is searched twice"):
        parse_space(["--search.x=1..2", "--search.x=3..4"])
