"""Rules: no list ever has what they forbid, and every list is full while anything is left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.serving.rules import CategoryFilter, ItemFacts, Rules, capped

NAMES = ("drama", "comedy", "horror")
ITEMS = 30
item_ids = st.integers(1, ITEMS)
some_items = st.lists(item_ids, max_size=12).map(lambda ids: np.array(ids, np.int64))
some_names = st.lists(st.sampled_from(NAMES), max_size=2, unique=True).map(tuple)


@st.composite
def catalogues(draw):
    rows = draw(st.lists(some_names, min_size=ITEMS, max_size=ITEMS))
    added = np.array(draw(st.lists(st.integers(0, 5), min_size=ITEMS + 1, max_size=ITEMS + 1)))
    return rows, ItemFacts.of((*rows, *[NAMES]), added_at=np.append(added, 9))


@st.composite
def rules(draw):
    return Rules(
        exclude=draw(some_items),
        allow=draw(st.none() | some_items),
        categories=CategoryFilter(any_of=draw(some_names), none_of=draw(some_names)),
        added_after=draw(st.integers(0, 4)),
        max_per_category=draw(st.integers(0, 3)),
        boosts=draw(st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2), max_size=2)),
        threshold=draw(st.sampled_from([-np.inf, 0.0])),
    )


@given(catalogue=catalogues(), rule=rules(), seed=st.integers(0, 99), size=st.integers(1, 12))
def test_no_list_has_what_is_forbidden_and_none_is_short_without_a_reason(catalogue, rule, seed, size):
    rows, facts = catalogue
    rows = [*rows, NAMES]
    raw = np.random.default_rng(seed).normal(size=ITEMS + 2)
    scores = rule.scores(raw, facts)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > -np.inf]
    found = order[capped(order, facts, rule.max_per_category, size)]

    def forbidden(item):
        own = set(rows[item - 1])
        return (
            item in rule.exclude
            or (rule.allow is not None and item not in rule.allow)
            or (rule.categories.any_of and not own & set(rule.categories.any_of))
            or own & set(rule.categories.none_of)
            or (rule.added_after and facts.added_at[item] < rule.added_after)
            or raw[item] < rule.threshold
        )

    assert len(set(found.tolist())) == len(found) <= size
    assert 0 not in found
    assert not [item for item in found.tolist() if forbidden(item)]
    of_category = {name: [i for i in found.tolist() if name in rows[i - 1]] for name in NAMES}
    if rule.max_per_category:
        assert max(map(len, of_category.values())) <= rule.max_per_category
    if len(found) < size:
        left = [i for i in range(1, ITEMS + 2) if not forbidden(i) and i not in found]
        full = {name for name, own in of_category.items() if rule.max_per_category == len(own)}
        assert all(set(rows[item - 1]) & full for item in left), "each is of a category that is full"
    boosted = [raw[i] + sum(rule.boosts.get(name, 0.0) for name in rows[i - 1]) for i in found.tolist()]
    assert boosted == pytest.approx(sorted(boosted, reverse=True))


def test_an_unknown_category_is_named():
    facts = ItemFacts.of([("drama",), ()])
    with pytest.raises(ValueError, match="category 'opera': the catalogue has drama"):
        CategoryFilter(any_of=("opera",)).allowed(facts)
