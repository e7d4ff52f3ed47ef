"""The heads against NumPy twins, and what they have to share."""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrec.nn.heads import PLE, Head, MMoE, SharedBottom

DIM, BEHAVIOURS = 4, 3
QUERIES, ITEMS = jax.random.normal(jax.random.key(0), (2, 7, DIM))
HEADS = [
    SharedBottom(),
    MMoE(num_experts=3, expert_dim=8),
    PLE(expert_dim=8),
    PLE(num_layers=3, own_experts=2),
]


def made(config, seed=0):
    """The head with random numbers in every parameter, the gates too."""
    head = config.make(DIM, BEHAVIOURS, rngs=nnx.Rngs(seed))
    random = np.random.default_rng(seed)
    for _, variable in nnx.iter_graph(head):
        if isinstance(variable, nnx.Param):
            variable[...] = jnp.asarray(random.normal(0, 0.5, variable.shape), jnp.float32)
    return head


def numbers(head):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(head, nnx.Param)))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def features():
    queries, items = np.asarray(QUERIES, np.float64), np.asarray(ITEMS, np.float64)
    return np.concatenate([queries, items, queries * items], -1)


def shared_bottom_twin(config, of):
    hidden = gelu(features() @ of["hidden"]["kernel"] + of["hidden"]["bias"])
    return hidden @ of["out"]["kernel"] + of["out"]["bias"]


def mmoe_twin(config, of):
    """One expert and one gate at a time."""
    x, level = features(), of["levels"][0]
    experts = [
        gelu(x @ kernel + bias)
        for kernel, bias in zip(level["expert_kernel"], level["expert_bias"], strict=True)
    ]
    logits = []
    for k in range(BEHAVIOURS):
        gate = scipy.special.softmax(x @ level["gate_kernel"][k], -1)
        mixed = sum(gate[:, e : e + 1] * expert for e, expert in enumerate(experts))
        logits.append(mixed @ of["out_kernel"][k] + of["out_bias"][k])
    return np.stack(logits, -1)


def ple_twin(config, of):
    """One behaviour at a time, with the lists of experts that its gate sees."""
    own = config.own_experts
    streams = [features()] * (BEHAVIOURS + 1)
    for number in range(config.num_layers):
        level = of["levels"][number]
        readers = [k for k in range(BEHAVIOURS) for _ in range(own)] + [BEHAVIOURS] * config.shared_experts
        experts = [
            gelu(streams[reader] @ kernel + bias)
            for reader, kernel, bias in zip(
                readers, level["expert_kernel"], level["expert_bias"], strict=True
            )
        ]
        mixed = []
        for k in range(BEHAVIOURS):
            seen = experts[k * own : (k + 1) * own] + experts[BEHAVIOURS * own :]
            gate = scipy.special.softmax(streams[k] @ level["gate_kernel"][k], -1)
            mixed.append(sum(gate[:, e : e + 1] * expert for e, expert in enumerate(seen)))
        if number < config.num_layers - 1:
            gate = scipy.special.softmax(streams[-1] @ level["shared_gate_kernel"], -1)
            mixed.append(sum(gate[:, e : e + 1] * expert for e, expert in enumerate(experts)))
        streams = mixed
    return np.stack([streams[k] @ of["out_kernel"][k] + of["out_bias"][k] for k in range(BEHAVIOURS)], -1)


TWINS = {SharedBottom: shared_bottom_twin, MMoE: mmoe_twin, PLE: ple_twin}


@pytest.mark.parametrize("config", HEADS, ids=str)
def test_a_head_equals_its_twin(config):
    head = made(config)
    found = head(QUERIES, ITEMS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, TWINS[type(config)](config, numbers(head)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", HEADS, ids=str)
def test_a_head_takes_any_lead_and_bfloat16(config):
    head = made(config)
    flat = head(QUERIES, ITEMS)
    np.testing.assert_allclose(head(QUERIES[None, :, None], ITEMS[None, :, None])[0, :, 0], flat, rtol=1e-5)
    rounded = head(QUERIES.astype(jnp.bfloat16), ITEMS.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, flat, atol=0.02 * float(jnp.abs(flat).max()))


def test_one_level_without_own_experts_is_a_multi_gate_mixture():
    level = PLE(num_layers=1, shared_experts=3, own_experts=0, expert_dim=8)
    mixture = made(MMoE(num_experts=3, expert_dim=8))
    np.testing.assert_array_equal(made(level)(QUERIES, ITEMS), mixture(QUERIES, ITEMS))
    np.testing.assert_allclose(
        made(level)(QUERIES, ITEMS), mmoe_twin(level, numbers(mixture)), rtol=1e-4, atol=1e-5
    )


def test_one_expert_is_a_shared_bottom():
    head, bottom = made(MMoE(num_experts=1, expert_dim=DIM)), made(SharedBottom())
    of = numbers(head)
    bottom.hidden.kernel[...] = of["levels"][0]["expert_kernel"][0]
    bottom.hidden.bias[...] = of["levels"][0]["expert_bias"][0]
    bottom.out.kernel[...], bottom.out.bias[...] = of["out_kernel"].T, of["out_bias"]
    np.testing.assert_allclose(head(QUERIES, ITEMS), bottom(QUERIES, ITEMS), rtol=1e-5, atol=1e-6)


def test_own_experts_learn_from_their_behaviour_alone():
    head = made(PLE(num_layers=1, shared_experts=2, own_experts=2, expert_dim=8))
    graphdef, state = nnx.split(head)
    gradients = nnx.to_pure_dict(
        jax.grad(lambda state: jnp.sum(nnx.merge(graphdef, state)(QUERIES, ITEMS)[..., 1]))(state)
    )
    moved = np.abs(gradients["levels"][0]["expert_kernel"]).max((1, 2)) > 0
    # Behaviour 1 owns experts 2 and 3; 6 and 7 are shared.
    np.testing.assert_array_equal(moved, [False, False, True, True, False, False, True, True])


@pytest.mark.parametrize("config", HEADS, ids=str)
def test_operations_are_those_of_the_compiled_products(config):
    dim, pairs = 8, 16
    head = config.make(dim, BEHAVIOURS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(head)
    forward = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, x))
    costs = forward.lower(state, jnp.zeros((pairs, dim))).compile().cost_analysis()
    # Element-wise work comes on top: activations, softmax, the features themselves.
    formula = 2 * pairs * config.multiply_adds(dim, BEHAVIOURS)
    assert formula <= costs["flops"] <= 1.3 * formula


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMoE(num_experts=0), "MMoE.num_experts=0 must be at least 1"),
        (lambda: PLE(num_layers=0), "PLE.num_layers=0 must be at least 1"),
        (lambda: PLE(shared_experts=0), "PLE.shared_experts=0"),
        (lambda: PLE(own_experts=-1), "PLE.own_experts=-1"),
        (lambda: dataclasses.replace(PLE(), expert_dim=0), "PLE.expert_dim=0"),
    ],
)
def test_bad_sizes_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_base_says_what_is_missing():
    with pytest.raises(TypeError, match="Head must define make"):
        Head().make(DIM, BEHAVIOURS, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Head must define multiply_adds"):
        Head().multiply_adds(DIM, BEHAVIOURS)
