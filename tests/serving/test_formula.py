"""Formulas: what they say, what they refuse, and that nothing else gets through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.serving.formula import Formula

KNOWN = ("click", "buy", "score")
COLUMNS = {
    "click": np.array([0.1, 0.5, 0.0]),
    "buy": np.array([0.25, 0.04, 1.0]),
    "score": np.array([-1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("click * buy^0.5", [0.05, 0.1, 0.0]),
        ("-score + 2", [3.0, 0.0, -1.0]),
        ("max(click, buy) / 2", [0.125, 0.25, 0.5]),
        ("2^3^0.5", [2**3**0.5] * 3),
        ("log(click)", [np.log(0.1), np.log(0.5), -np.inf]),
        ("1 / (buy - 1)", [1 / -0.75, 1 / -0.96, -np.inf]),
    ],
)
def test_a_formula_says_what_it_looks_like(text, wanted):
    formula = Formula.parse(text, KNOWN)
    np.testing.assert_allclose(formula(COLUMNS), wanted)
    assert formula.names <= set(KNOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clock * 2", "'clock' is no score; there are buy, click, score"),
        ("__import__('os')", "is not read; use numbers"),
        ("click.real", "is not read"),
        ("[1][0]", "is not read"),
        ("click if buy else 1", "is not read"),
        ("'a' * 3", "is not read"),
        ("True", "is not read"),
        ("min(click)", "min takes 2, not 1"),
        ("click +", "is no formula"),
        ("", "is no formula"),
        ("1+" * 120 + "1", "has more than 100 parts"),
        ("1+" * 300 + "1", "at most 500 are read"),
        ("score+1" + "0" * 400, "a number is too large; write none above 1.8e\\+308"),
        ("1e309", "a number is too large"),
        ("(" * 249 + "1" + ")" * 249, "is no formula"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Formula.parse(text, KNOWN)


@given(st.text(max_size=80))
def test_any_text_gives_scores_or_a_clear_error(text):
    try:
        formula = Formula.parse(text, KNOWN)
    except ValueError:
        return
    scores = formula(COLUMNS)
    assert scores.shape == (3,)
    assert not np.isnan(scores).any()
    assert not (scores == np.inf).any()
