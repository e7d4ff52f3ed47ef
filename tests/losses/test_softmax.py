"""The vocabulary-parallel full softmax equals the dense one, in value and gradient, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.core.sparse_logits import MixedLogits, SparseLogits, in_blocks
from jaxrec.embedding.table import TableSpec, init_table
from jaxrec.losses.softmax import full_softmax
from jaxrec.losses.target_trust import TargetTrust

NUM_ROWS, DIM = 37, 8


def dense_twin(queries, vectors, bias, targets, weights, extra=None, trust=TargetTrust()):
    logits = queries @ vectors.T + bias
    if extra is not None:
        logits = logits.at[jnp.arange(len(targets))[:, None], extra.item_ids].add(extra.values)
    logits = logits.at[:, 0].set(-jnp.inf)
    log_p = jax.nn.log_softmax(logits)
    losses = -log_p[jnp.arange(len(targets)), jnp.where(weights > 0, targets, 1)]  # padding has p = 0
    if trust.smoothing:  # cross-entropy against the smoothed target
        losses = (1 - trust.smoothing) * losses - trust.smoothing * jnp.mean(log_p[:, 1:], -1)
    if trust.power:
        losses = (1 - jnp.exp(-losses) ** trust.power) / trust.power
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))


def problem(mesh, num_tokens, num_rows=NUM_ROWS):
    keys = jax.random.split(jax.random.key(1), 4)
    table = init_table(TableSpec(num_rows=num_rows, dim=DIM, init_scale=1.0), jax.random.key(0), mesh)
    bias = jax.random.normal(keys[0], (num_rows,))
    queries = jax.random.normal(keys[1], (num_tokens, DIM))
    weights = jnp.round(jax.random.uniform(keys[2], (num_tokens,)) * 2)
    targets = jnp.where(weights > 0, jax.random.randint(keys[3], (num_tokens,), 1, num_rows), 0)
    return table, bias, queries, targets, weights


@pytest.mark.parametrize("chunk_logits", [1, 300, 10**9])
def test_value_and_gradients_equal_the_dense_twin(mesh, chunk_logits, sharded_rows):
    table, bias, queries, targets, weights = problem(mesh, 32)
    of_tokens = jax.device_put((targets, weights), sharding(mesh, "batch"))
    sizes = {"num_rows": NUM_ROWS, "chunk_logits": chunk_logits}
    sharded_rows.assert_equal_to_twin(
        lambda q, v, b: 3.0 * full_softmax(q, *of_tokens, v, b, **sizes),
        lambda q, v, b: 3.0 * dense_twin(q, v, b, targets, weights),
        queries,
        table,
        bias,
        mesh,
    )


TRUSTS = [TargetTrust(smoothing=0.3), TargetTrust(power=0.4)]


@pytest.mark.parametrize(
    ("chunk_logits", "trust"),  # 30: four tiles of items a shard
    [(size, TargetTrust()) for size in (30, 300, 10**9)]
    + [(size, t) for size in (30, 10**9) for t in TRUSTS],
)
def test_logits_of_a_few_items_are_added(mesh, chunk_logits, trust, sharded_rows):
    rows, length, window = 8, 20, 4  # a row is two blocks, the second one not full
    table, bias, queries, targets, weights = problem(mesh, rows * length)
    rng = np.random.default_rng(0)
    item_ids = rng.integers(0, NUM_ROWS, (rows, length, 6))  # 0 = an empty place
    item_ids[..., 1] = item_ids[..., 0]  # named twice: both count
    item_ids[:, ::2, 2] = np.asarray(targets).reshape(rows, length)[:, ::2]
    ages = np.arange(window) <= np.arange(length)[:, None]
    arrays = (
        jnp.asarray(rng.normal(size=item_ids.shape), jnp.float32),
        jnp.asarray(rng.normal(size=(rows, length, window)) * ages, jnp.float32),
        jnp.asarray(rng.normal(size=(rows, length)), jnp.float32),
    )
    ids = jnp.asarray(item_ids, jnp.int32)

    def twin(queries, vectors, bias, values, mixing, at_target):
        """What each token gets, worked out list by list."""
        named = jax.nn.one_hot(ids, NUM_ROWS) * (ids > 0)[..., None]
        lists = jnp.einsum("rlmv,rlm->rlv", named, values)
        added = sum(
            mixing[..., age, None] * jnp.pad(lists, ((0, 0), (age, 0), (0, 0)))[:, :length]
            for age in range(window)
        ).reshape(rows * length, NUM_ROWS)
        added = added.at[jnp.arange(rows * length), targets].add(at_target.reshape(-1))
        every = jnp.broadcast_to(jnp.arange(NUM_ROWS), added.shape)
        return dense_twin(queries, vectors, bias, targets, weights, SparseLogits(every, added), trust)

    split = jax.device_put((queries, targets, weights, ids, arrays), sharding(mesh, "batch"))

    def loss(queries, vectors, bias, *arrays):
        mixed = MixedLogits.of_events(split[3], *arrays)
        tokens = (
            jax.lax.collapse(in_blocks(x.reshape(rows, length, *x.shape[1:]), mixed.block), 0, 3)
            for x in (queries, split[1], split[2])
        )
        return full_softmax(
            *tokens, vectors, bias, num_rows=NUM_ROWS, mixed=mixed, trust=trust, chunk_logits=chunk_logits
        )

    places = (0, 1, 2, 3, 4, 5)
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=places))(
        split[0], table, sharded_rows.in_physical_order(bias), *split[4]
    )
    logical = functools.partial(sharded_rows.in_logical_order, num_rows=NUM_ROWS)
    expected, expected_gradients = jax.value_and_grad(twin, places)(
        queries, jnp.asarray(logical(table)), bias, *arrays
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    found = [gradients[0], logical(gradients[1]), logical(gradients[2]), *gradients[3:]]
    for one, other in zip(found, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    only_value = jax.jit(loss)(split[0], table, sharded_rows.in_physical_order(bias), *split[4])
    np.testing.assert_allclose(only_value, expected, rtol=1e-5)


@settings(max_examples=10)
@given(num_tokens=st.integers(0, 9), num_rows=st.integers(2, 20), chunk_logits=st.integers(1, 200))
def test_any_size_on_one_device(num_tokens, num_rows, chunk_logits):
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        table, bias, queries, targets, weights = problem(mesh, num_tokens, num_rows)
        loss = functools.partial(full_softmax, num_rows=num_rows, chunk_logits=chunk_logits)
        value = jax.jit(loss)(queries, targets, weights, table, bias)
        np.testing.assert_allclose(
            value, dense_twin(queries, table, bias, targets, weights), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("settings", [{"smoothing": 1.0}, {"power": -0.1}, {"smoothing": 0.1, "power": 0.1}])
def test_trust_names_what_is_wrong(settings):
    with pytest.raises(ValueError, match="trust.smoothing|trust.power"):
        TargetTrust(**settings)


def test_large_scores_do_not_overflow(mesh, sharded_rows):
    table, bias, queries, targets, weights = problem(mesh, 16)
    value = full_softmax(
        queries * 1e4,
        targets,
        weights,
        table,
        sharded_rows.in_physical_order(bias),
        num_rows=NUM_ROWS,
        chunk_logits=100,
    )
    assert np.isfinite(value)


def test_no_array_of_tokens_by_items_exists():
    """4,096 tokens x 4,097 items would be 67 MB of logits; the compiled step may take a tenth of it."""
    with jax.set_mesh(make_mesh((8, 1))) as mesh:
        del mesh
        shapes = [(4096, DIM), (4096,), (4096,), (8 * 513, DIM), (8 * 513,)]
        dtypes = [jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32]
        arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        loss = lambda *a: full_softmax(*a, num_rows=4097, chunk_logits=100_000)  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 3, 4))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6.7e6
