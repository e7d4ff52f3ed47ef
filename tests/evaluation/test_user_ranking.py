import jax
import numpy as np
import pytest

from jaxrec.evaluation.user_ranking import UserRanker, predict_behaviours


def twin(run, split="test", top_k=10, keep_targets=True):
    """Rank and list of each user, by the definition."""
    dataset = run.dataset
    ends, stops = (
        (dataset.validation_end, dataset.lengths)
        if split == "test"
        else (dataset.train_end, dataset.validation_end)
    )
    ids, expected = np.arange(len(run.vectors)), {}
    for user in np.flatnonzero((ends > 0) & (stops > ends)):
        events = dataset.histories(np.array([user])).item_ids
        history, target = events[: ends[user]], events[ends[user]]
        scores = run.vectors.astype(np.float64) @ run.vectors[history[-1]].astype(np.float64) + run.bias
        allowed = ids > 0
        if dataset.metadata.filter_seen:
            allowed &= ~np.isin(ids, history)
        if keep_targets:
            allowed |= ids == target
        ahead = (scores > scores[target]) | ((scores == scores[target]) & (ids < target))
        order = ids[allowed][np.argsort(-scores[allowed], kind="stable")][:top_k]
        expected[user] = (target, np.sum(ahead & allowed), np.pad(order, (0, top_k - len(order))))
    return expected


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_users_rank_as_the_definition_says(make_last_item_run, make_small_dataset, split, filter_seen):
    run = make_last_item_run(dataset=make_small_dataset(filter_seen=filter_seen))
    ranker = UserRanker(run, top_k=10)
    rows = ranker.rows(split, rows_per_batch=8)
    ranks, timing = ranker.rank(rows)
    expected = twin(run, split)
    assert timing.num_users == len(ranks) == len(expected)
    assert timing.users_per_second > 0
    np.testing.assert_array_equal(ranks.user_indices, sorted(expected))
    for i, user in enumerate(ranks.user_indices):
        target, rank, top = expected[user]
        assert (ranks.targets[i], ranks.ranks[i]) == (target, rank)
        np.testing.assert_array_equal(ranks.top_item_ids[i], top)


def test_results_are_bit_equal_for_every_mesh_and_batch_size(make_last_item_run):
    results = []
    for mesh_shape, rows_per_batch in [((1, 1), 64), ((1, 1), 3), ((8, 1), 8), ((2, 4), 16), ((1, 8), 1)]:
        ranker = UserRanker(make_last_item_run(mesh_shape), top_k=5)
        results.append(ranker.rank(ranker.rows("test", rows_per_batch=rows_per_batch))[0])
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, vars(other), vars(results[0]))


def test_lists_without_targets_hold_no_seen_item(make_last_item_run):
    run = make_last_item_run()
    ranker = UserRanker(run, top_k=45)
    parts = list(ranker.batches(ranker.rows("test", rows_per_batch=8), keep_targets=False))
    expected = twin(run, top_k=45, keep_targets=False)
    assert sum(len(part) for part in parts) == len(expected)
    for part in parts:
        for user, top in zip(part.user_indices, part.top_item_ids, strict=True):
            np.testing.assert_array_equal(top, expected[user][2])


def test_some_users_only(make_last_item_run):
    run = make_last_item_run()
    ranker = UserRanker(run)
    everybody = ranker.rank(ranker.rows("test", rows_per_batch=8))[0]
    some = ranker.rank(ranker.rows("test", rows_per_batch=8, user_indices=everybody.user_indices[3:9]))[0]
    np.testing.assert_array_equal(some.ranks, everybody.ranks[3:9])
    assert some.top_item_ids.shape == (6, 0)


def test_nobody_to_rank(make_last_item_run, make_small_dataset):
    ranker = UserRanker(make_last_item_run(dataset=make_small_dataset(lengths=[1, 2, 2])), top_k=3)
    ranks, _ = ranker.rank(ranker.rows("test", rows_per_batch=8))
    assert len(ranks) == 0
    assert ranks.top_item_ids.shape == (0, 3)


def test_a_diverged_model_is_an_error(make_last_item_run):
    run = make_last_item_run()
    run.query_fn = lambda batch: (np.nan * type(run).query_fn(run, batch)[0], None)
    ranker = UserRanker(run)
    with pytest.raises(ValueError, match="query vectors at step 7 hold NaN"):
        ranker.rank(ranker.rows("test", rows_per_batch=8))
    run.vectors[3] = np.inf
    with pytest.raises(ValueError, match="item vectors at step 7 hold NaN"):
        UserRanker(run)


def test_behaviours_come_with_the_labels_of_the_target(make_last_item_run):
    run = make_last_item_run(with_behaviours=True)
    rows = UserRanker(run).rows("test", rows_per_batch=8)
    predicted = predict_behaviours(run, rows)
    for i, user in enumerate(predicted.user_indices):
        history = run.dataset.histories(np.array([user]))
        np.testing.assert_array_equal(predicted.labels[i], history.labels[-1])
        logit = run.vectors[history.item_ids[-2], 0] + run.vectors[history.item_ids[-1], 0]
        np.testing.assert_allclose(predicted.logits[i], logit, rtol=1e-6)
    run.behaviour_logits = lambda batch: np.full((len(batch.targets), 2), np.nan)
    with pytest.raises(ValueError, match="behaviour vectors"):
        predict_behaviours(run, rows)
