import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.metrics.held_out_sets import hits_of_lists, set_metrics
from jaxrec.metrics.ranking import per_user_metrics


def test_by_hand():
    lists = np.array([[3, 1, 2], [5, 0, 0]])
    hits = hits_of_lists(lists, np.array([1, 2, 9, 4, 3]), np.array([0, 3, 5]))
    assert hits.tolist() == [[False, True, True], [False, False, False]]
    metrics = set_metrics(hits, np.array([3, 2]), (2, 3))
    assert metrics["hr@2"].tolist() == [1, 0]
    assert metrics["recall@2"].tolist() == [0.5, 0]
    assert metrics["recall@3"].tolist() == pytest.approx([2 / 3, 0])
    gains = 1 / np.log2([2, 3, 4])
    assert metrics["ndcg@3"].tolist() == pytest.approx([(gains[1] + gains[2]) / gains.sum(), 0])


@given(st.data())
def test_one_target_gives_the_metrics_of_its_rank(data):
    size = data.draw(st.integers(1, 6))
    lists = np.array(
        [data.draw(st.permutations(range(1, 9))) for _ in range(size)]
    )  # whole rankings: the target is always listed
    targets = np.array(data.draw(st.lists(st.integers(1, 8), min_size=size, max_size=size)))
    hits = hits_of_lists(lists, targets, np.arange(size + 1))
    ranks = np.argmax(lists == targets[:, None], axis=1)
    of_ranks = per_user_metrics(ranks, (1, 3, 8))
    for name, values in set_metrics(hits, np.ones(size, int), (1, 3, 8)).items():
        np.testing.assert_allclose(values, of_ranks[name], err_msg=name)


@given(st.data())
def test_all_targets_first_is_perfect_and_padding_never_hits(data):
    count = data.draw(st.integers(1, 5))
    targets = np.array(data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count, unique=True)))
    lists = np.concatenate([data.draw(st.permutations(targets.tolist())), np.zeros(6, int)])[None, :]
    hits = hits_of_lists(lists, targets, np.array([0, count]))
    assert hits.sum() == count
    for name, values in set_metrics(hits, np.array([count]), (1, 3, 6)).items():
        assert values[0] == pytest.approx(1.0), name


def test_nobody_without_a_target_and_no_list_too_short():
    hits = np.zeros((1, 3), bool)
    with pytest.raises(ValueError, match="without a target"):
        set_metrics(hits, np.array([0]), (1,))
    with pytest.raises(ValueError, match="lists of 3 items say nothing of k=5"):
        set_metrics(hits, np.array([1]), (1, 5))
