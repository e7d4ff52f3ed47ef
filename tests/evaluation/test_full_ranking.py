import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.mixture_score import MixtureScore
from jaxrec.core.partition import sharding
from jaxrec.core.sparse_logits import SparseLogits
from jaxrec.evaluation.full_ranking import FullRanking, _rank

MESH_SHAPES = [(1, 1), (8, 1), (2, 4), (1, 8)]


def mesh_of(shape):
    return make_mesh(shape, jax.devices()[: shape[0] * shape[1]])


def placed(mesh, vectors, bias, spare_rows=0):
    """Logical rows (row 0 = padding) -> physical rows on the mesh; the pad rows are the tempting ones."""
    shards = mesh.size
    rows_per_shard = -(-len(vectors) // shards) + spare_rows
    physical = np.full((rows_per_shard * shards, vectors.shape[1]), 100.0, np.float32)
    physical_bias = np.full(len(physical), 1e6, np.float32)
    ids = np.arange(len(vectors))
    where = ids % shards * rows_per_shard + ids // shards
    physical[where], physical_bias[where] = vectors, bias
    return (
        jax.device_put(physical, sharding(mesh, "row", None)),
        jax.device_put(physical_bias, sharding(mesh, "row")),
    )


def ranked(mesh, data, **options):
    ranking = FullRanking(mesh=mesh, num_items=len(data["vectors"]) - 1, **options)
    catalogue = ranking.catalogue(*placed(mesh, data["vectors"], data["bias"], spare_rows=3))
    seen = data["seen_queries"], data["seen_items"]
    out = ranking.rank(catalogue, data["queries"], data["targets"], *seen, extra=data.get("extra"))
    return jax.tree.map(np.asarray, out)


def twin(data, top_k=0, scores=None):
    """The definition, in NumPy, one query at a time; by products, or by these scores."""
    if scores is None:
        scores = data["queries"].astype(np.float64) @ data["vectors"].T.astype(np.float64) + data["bias"]
    ids = np.arange(len(data["vectors"]))
    if "extra" in data:
        np.add.at(scores, (np.arange(len(scores))[:, None], data["extra"].item_ids), data["extra"].values)
    ranks, tops = [], []
    for q, target in enumerate(data["targets"]):
        seen = data["seen_items"][data["seen_queries"] == q]
        allowed = (ids > 0) & (~np.isin(ids, seen) | (ids == target))
        ahead = (scores[q] > scores[q, target]) | ((scores[q] == scores[q, target]) & (ids < target))
        ranks.append(np.sum(ahead & allowed))
        order = np.lexsort((ids[allowed], -scores[q, allowed]))[:top_k]
        top = np.zeros(top_k, int)
        top[: len(order)] = ids[allowed][order]
        tops.append(top)
    return np.array(ranks), np.array(tops).reshape(len(ranks), top_k)


def whole_number_data(seed, num_queries=21, num_items=53, dim=8, num_seen=200):
    """Small whole numbers: every score is exact in any order, and many tie."""
    rng = np.random.default_rng(seed)
    return {
        "queries": rng.integers(-2, 3, (num_queries, dim)).astype(np.float32),
        "vectors": rng.integers(-2, 3, (num_items + 1, dim)).astype(np.float32),
        "bias": rng.integers(-1, 2, num_items + 1).astype(np.float32),
        "targets": rng.integers(1, num_items + 1, num_queries).astype(np.int32),
        "seen_queries": rng.integers(0, num_queries, num_seen).astype(np.int32),
        "seen_items": rng.integers(0, num_items + 1, num_seen).astype(np.int32),  # 0 = padding
    }


def real_data(seed=0, num_queries=40, num_items=700, dim=64, num_seen=2000):
    rng = np.random.default_rng(seed)
    data = whole_number_data(seed, num_queries, num_items, dim, num_seen)
    data["queries"] = rng.normal(size=(num_queries, dim)).astype(np.float32)
    data["vectors"] = (rng.normal(size=(num_items + 1, dim)) * rng.lognormal(size=(num_items + 1, 1))).astype(
        np.float32
    )
    data["vectors"][2::7] = data["vectors"][1::7][: len(data["vectors"][2::7])]  # exact ties
    data["bias"] = rng.normal(size=num_items + 1).astype(np.float32)
    data["bias"][2::7] = data["bias"][1::7][: len(data["bias"][2::7])]
    return data


@pytest.mark.parametrize("shape", MESH_SHAPES, ids=str)
def test_ranks_and_top_k_equal_the_definition_on_every_mesh(shape):
    for seed, options in enumerate([{"block_queries": 4, "chunk_items": 2}, {}]):
        data = whole_number_data(seed)
        ranks, top_ids = twin(data, top_k=12)
        got = ranked(mesh_of(shape), data, top_k=12, **options)
        np.testing.assert_array_equal(got.ranks, ranks)
        np.testing.assert_array_equal(got.top_item_ids, top_ids)


def test_results_are_bit_equal_for_every_mesh_chunk_block_and_batch():
    data = real_data()
    expected = ranked(mesh_of((1, 1)), data, top_k=20)
    for shape, chunk_items, block_queries in [
        ((8, 1), 0, 0),
        ((2, 4), 13, 7),
        ((1, 8), 1, 40),
        ((1, 1), 64, 1),
    ]:
        got = ranked(mesh_of(shape), data, top_k=20, chunk_items=chunk_items, block_queries=block_queries)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    for first, last in [(0, 1), (1, 40)]:
        part = dict(data, queries=data["queries"][first:last], targets=data["targets"][first:last])
        part["seen_queries"] = data["seen_queries"] - first
        got = ranked(mesh_of((2, 4)), part, top_k=20)
        jax.tree.map(
            np.testing.assert_array_equal,
            got,
            jax.tree.map(operator.itemgetter(slice(first, last)), expected),
        )


@pytest.mark.parametrize("shape", MESH_SHAPES, ids=str)
def test_a_mixture_ranks_by_its_scores_on_every_mesh(shape):
    score = MixtureScore(2, 6)
    data = real_data(seed=3, num_queries=13, num_items=150, dim=score.width)
    data["vectors"][2::7, -1] += 1.0  # no exact ties; the sharpness is the query's
    scores = np.asarray(score.all_pairs(jnp.asarray(data["queries"]), jnp.asarray(data["vectors"])))
    ranks, top_ids = twin(data, top_k=12, scores=scores + data["bias"])
    got = ranked(mesh_of(shape), data, top_k=12, score=score, block_queries=5, chunk_items=7)
    np.testing.assert_array_equal(got.ranks, ranks)
    np.testing.assert_array_equal(got.top_item_ids, top_ids)


@pytest.mark.parametrize("dim", [1, 64, 768])
def test_scores_are_as_accurate_as_float32_at_any_width(dim):
    data = real_data(seed=dim, num_queries=9, num_items=200, dim=dim)
    got = ranked(mesh_of((2, 4)), data, top_k=15)
    exact = data["queries"].astype(np.float64) @ data["vectors"].T.astype(np.float64) + data["bias"]
    lengths = np.linalg.norm(data["queries"], axis=1)[:, None] * np.linalg.norm(data["vectors"], axis=1)
    taken = np.take_along_axis(exact, got.top_item_ids, 1)
    bound = 4e-7 * (np.take_along_axis(lengths, got.top_item_ids, 1) + np.abs(taken))
    assert np.all(np.abs(got.top_scores - taken) <= bound)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    num_items=st.sampled_from([1, 8, 41]),
)
def test_any_small_catalogue_ranks_like_the_definition(seed, num_items):
    data = whole_number_data(seed, 5, num_items, 3, 30)
    ranks, top_ids = twin(data, top_k=4)
    got = ranked(mesh_of((2, 4)), data, top_k=4, chunk_items=3)
    np.testing.assert_array_equal(got.ranks, ranks)
    np.testing.assert_array_equal(got.top_item_ids, top_ids)
    assert np.array_equal(got.top_item_ids == 0, got.top_scores == -np.inf)


def test_a_target_in_the_top_k_stands_at_its_rank():
    data = whole_number_data(3)
    got = ranked(mesh_of((2, 4)), data, top_k=20)
    for rank, target, top in zip(got.ranks, data["targets"], got.top_item_ids, strict=True):
        assert (target in top) == (rank < 20)
        if rank < 20:
            assert top[rank] == target


def test_without_a_target_all_seen_items_are_left_out():
    data = whole_number_data(4)
    data["targets"] = np.zeros_like(data["targets"])
    got = ranked(mesh_of((8, 1)), data, top_k=53)
    for q, top in enumerate(got.top_item_ids):
        seen = set(data["seen_items"][data["seen_queries"] == q]) - {0}
        assert set(top) - {0} == set(range(1, 54)) - seen


def test_a_broken_model_never_ranks_well():
    data = real_data(num_items=50)
    data["queries"][0] = np.nan
    data["vectors"][data["targets"][1]] = np.nan
    data["queries"][2, 5] = np.inf
    got = ranked(mesh_of((2, 4)), dict(data, seen_items=np.zeros_like(data["seen_items"])))
    assert np.all(got.ranks[:3] >= 48)


def test_zero_vectors_tie_and_the_lower_id_wins():
    data = whole_number_data(5)
    data.update(queries=data["queries"] * 0, bias=data["bias"] * 0, seen_items=data["seen_items"] * 0)
    np.testing.assert_array_equal(ranked(mesh_of((2, 4)), data).ranks, data["targets"] - 1)


def test_queries_on_the_mesh_and_no_gathered_catalogue():
    mesh = mesh_of((2, 4))
    data = real_data(num_queries=16, num_items=4000)
    ranking = FullRanking(mesh=mesh, num_items=4000, top_k=10, chunk_items=128)
    catalogue = ranking.catalogue(*placed(mesh, data["vectors"], data["bias"]))
    for leaf in jax.tree.leaves(catalogue):
        assert leaf.sharding.is_equivalent_to(sharding(mesh, "row"), leaf.ndim)
    queries = jax.device_put(data["queries"], sharding(mesh, "batch", None))
    seen = data["seen_queries"] % 16, data["seen_items"]
    got = ranking.rank(catalogue, queries, data["targets"], *seen)
    again = ranking.rank(catalogue, jnp.asarray(data["queries"]), data["targets"], *seen)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    text = _rank.lower(ranking, catalogue, queries, data["targets"], *seen, None, None).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathered
    assert all("[16,64]" in line or "[16,80]" in line for line in gathered), gathered


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"num_items": 0}, 8, "num_items=0"),
        ({"num_items": 3, "top_k": -1}, 8, "top_k=-1"),
        ({"num_items": 8}, 8, "at least 9 rows"),
        ({"num_items": 3}, 12, "multiple of the shards"),
    ],
)
def test_wrong_sizes_are_named(options, rows, message):
    with pytest.raises(ValueError, match=message):
        FullRanking(mesh=mesh_of((2, 4)), **options).catalogue(jnp.zeros((rows, 2)), jnp.zeros(rows))


def with_extra(data, seed, places=9):
    rng = np.random.default_rng(seed)
    shape = (len(data["queries"]), places)
    item_ids = rng.integers(0, len(data["vectors"]), shape).astype(np.int32)
    item_ids[:, 1] = item_ids[:, 0]
    item_ids[::3, 2] = data["targets"][::3]
    values = (rng.integers(-64, 65, shape) / 32).astype(np.float32)
    return data | {"extra": SparseLogits(item_ids, values)}


@pytest.mark.parametrize("shape", MESH_SHAPES)
@pytest.mark.parametrize("blocks", [{}, {"block_queries": 4, "chunk_items": 5}])
def test_what_is_added_to_scores_moves_ranks_and_lists(shape, blocks):
    data = with_extra(whole_number_data(3), 3)
    found = ranked(mesh_of(shape), data, top_k=7, **blocks)
    ranks, tops = twin(data, top_k=7)
    np.testing.assert_array_equal(found.ranks, ranks)
    np.testing.assert_array_equal(found.top_item_ids, tops)
    assert np.any(ranks != twin(whole_number_data(3))[0])


def test_sums_of_what_is_added_have_the_same_bits_everywhere():
    data = with_extra(real_data(), 0)
    rng = np.random.default_rng(1)
    data["extra"] = SparseLogits(
        data["extra"].item_ids, rng.normal(size=data["extra"].values.shape).astype(np.float32)
    )
    first = ranked(mesh_of((1, 1)), data, top_k=20)
    for shape in MESH_SHAPES[1:]:
        other = ranked(mesh_of(shape), data, top_k=20, block_queries=7, chunk_items=11)
        jax.tree.map(np.testing.assert_array_equal, first, other)
