"""Sequence contrast: what a view may do to a history, and the loss against its twin by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.tasks.sequence_contrast import SequenceContrast
from tests.tasks.test_tasks import FACTS, packed

lengths = st.lists(st.lists(st.integers(1, 8), max_size=3), min_size=1, max_size=4)


@settings(max_examples=30)
@given(lengths, st.sampled_from(["crop", "mask", "reorder"]), st.integers(0, 9))
def test_a_view_stays_inside_its_history(lengths_by_row, kind, seed):
    batch = packed(lengths_by_row)
    task = SequenceContrast(views=(kind,), crop_rate=0.5, mask_rate=0.5, reorder_rate=0.5)
    plan = task.plan(batch, FACTS, jax.random.key(seed))
    weights = np.asarray(plan.arrays["weights"])
    for view in plan.arrays["views"]:
        view = jax.tree.map(np.asarray, view)
        for row, row_lengths in enumerate(lengths_by_row):
            start, lasts = 0, []
            for length in row_lengths:
                inside = slice(start, start + length)
                # A permutation of the history's own events; only `reorder` moves any, at most half of them.
                assert sorted(view.source[row, inside]) == list(range(start, start + length))
                moved = np.count_nonzero(view.source[row, inside] != np.arange(start, start + length))
                assert moved <= (-(-length // 2) if kind == "reorder" else 0)
                kept = np.flatnonzero(view.kept[row, inside])
                assert len(kept) == (-(-length // 2) if kind == "crop" else length)
                assert kept[-1] - kept[0] == len(kept) - 1  # in one piece
                assert kind == "mask" or not view.masked[row, inside].any()
                if length > 1:
                    lasts.append(start + kept[-1])
                start += length
            found = view.last[row][weights[row] > 0]
            assert list(found) == lasts
    assert float(plan.weight) == sum(length > 1 for row in lengths_by_row for length in row)


def test_views_differ_and_meet_their_rates():
    batch = packed([[24]] * 300)
    for kind, field in (("mask", "masked"), ("reorder", "source"), ("crop", "kept")):
        plan = SequenceContrast(views=(kind,)).plan(batch, FACTS, jax.random.key(0))
        one, other = (np.asarray(getattr(view, field)) for view in plan.arrays["views"])
        assert (one != other).any()
    plan = SequenceContrast(views=("mask",)).plan(batch, FACTS, jax.random.key(0))
    assert abs(np.asarray(plan.arrays["views"][0].masked).mean() - 0.3) < 0.02


def test_no_more_histories_than_the_bound():
    batch = packed([[3, 3, 3, 3]])
    plan = SequenceContrast(max_histories=2).plan(batch, FACTS, jax.random.key(0))
    assert float(plan.weight) == 2


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh((1, 1), jax.devices()[:1])):
        yield


@pytest.mark.usefixtures("one_device")
def test_loss_is_that_of_pairs_by_hand(monkeypatch):
    rng = np.random.default_rng(0)
    views = [rng.normal(size=(4, 3)) for _ in range(2)]
    views = [view / np.linalg.norm(view, axis=1, keepdims=True) for view in views]
    given = iter(views)
    monkeypatch.setattr(SequenceContrast, "_encode", lambda *_: jnp.asarray(next(given), jnp.float32))
    task = SequenceContrast(temperature=0.5)
    batch = packed([[5], [4], [1], [6]])  # the third history has one event: neither asked nor a negative
    batch = dataclasses.replace(batch, user_ids=np.where(batch.user_ids == 4, 1, batch.user_ids))
    plan = task.plan(batch, FACTS, jax.random.key(0))
    weights = np.asarray(plan.arrays["weights"])[:, :1]
    users = np.asarray(plan.arrays["users"])[:, :1]
    plan = dataclasses.replace(plan, arrays=plan.arrays | {"weights": weights, "users": users})
    found = float(task.loss(None, plan, jax.random.key(1)).total)
    expected = 0.0
    for a, b in (views, views[::-1]):
        logits = a @ b.T / 0.5
        for i in (0, 1, 3):
            # Rows 0 and 3 are of one user: no negatives of each other.
            others = [j for j in (0, 1, 3) if users[j, 0] != users[i, 0] or j == i]
            expected += 0.5 * (np.log(np.exp(logits[i, others]).sum()) - logits[i, i])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"crop_rate": 0.0}, "crop_rate=0.0 must lie"),
        ({"views": ("flip",)}, "has 'flip'"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"max_histories": 0}, "max_histories=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_told(wrong, said):
    with pytest.raises(ValueError, match=said):
        SequenceContrast(**wrong)
