"""Codes: what is read back is near, bytes are those of the arrays, scores are those of the decoded rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxrec.compression.codes import Plain, RowCodes
from jaxrec.compression.product_codes import NUM_CENTROIDS, ProductCodes
from jaxrec.compression.row_codes import encode_rows, pack_nibbles, unpack_nibbles
from jaxrec.nn.integer_products import nearest_int8

ENTRIES = st.floats(-1e4, 1e4, width=32)
MATRICES = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=ENTRIES
)


@settings(max_examples=12)
@given(MATRICES, st.integers(1, 10))
def test_int8_entries_are_off_by_at_most_half_a_scale(rows, group):
    code = RowCodes.of(rows, bits=8, group=group)
    scales = np.repeat(code.scales.astype(np.float32), code.group, 1)[:, : rows.shape[1]]
    assert code.decode().shape == rows.shape
    # The smallest float16 bounds what a scale can say; float32 rounds the product.
    assert (np.abs(np.asarray(code.decode()) - rows) <= 0.5 * scales * (1 + 1e-5) + 6e-8).all()


@settings(max_examples=12)
@given(MATRICES, st.integers(1, 10))
def test_int4_is_no_worse_than_without_cutting(rows, group):
    code = RowCodes.of(rows, bits=4, group=group)
    width = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, -width % code.group)))
    reach = np.abs(padded.reshape(len(rows), -1, code.group)).max(-1) / 7
    error = np.pad(np.asarray(code.decode()) - rows, ((0, 0), (0, -width % code.group)))
    of_groups = np.square(error.reshape(len(rows), -1, code.group)).sum(-1)
    plain = code.group * np.square(0.5 * (reach * (1 + 2**-10) + 6e-8))
    assert (of_groups <= plain * (1 + 1e-4)).all()


@settings(max_examples=12)
@given(MATRICES, st.sampled_from([4, 8]), st.integers(1, 10))
def test_zeros_stay_zeros_and_bytes_are_counted(rows, bits, group):
    rows[0] = 0.0
    code = RowCodes.of(rows, bits=bits, group=group)
    assert not np.asarray(code.decode())[0].any()
    num_rows, width = rows.shape
    numbers = width if bits == 8 else -(-width // 2)
    assert code.num_bytes == num_rows * (numbers + 2 * -(-width // min(group, width)))
    for name, (shape, dtype) in code.expected().items():
        assert code.arrays[name].shape == shape and code.arrays[name].dtype == dtype


@settings(max_examples=12)
@given(
    arrays.arrays(
        np.int8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-8, 7)
    )
)
def test_nibbles_are_read_back(numbers):
    packed = pack_nibbles(numbers)
    assert packed.shape[1] == -(-numbers.shape[1] // 2)
    np.testing.assert_array_equal(unpack_nibbles(jnp.asarray(packed), numbers.shape[1]), numbers)


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_each_output_of_a_kernel_has_its_own_scale(num_inputs):
    kernel = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    kernel[..., 0] *= 1000.0
    code = RowCodes.of(kernel, bits=8, num_inputs=num_inputs)
    outputs = 5 if num_inputs == 2 else 15
    assert code.scales.shape == (outputs, 1)
    off = np.abs(np.asarray(code.decode()) - kernel)
    assert off[..., 1:].max() < 0.02  # one scale for all would be off by 4
    assert code.decode().shape == kernel.shape


@settings(max_examples=12)
@given(st.integers(2, 600), st.sampled_from([(4, 2), (6, 6), (5, 1)]), st.integers(0, 3))
def test_product_codes_have_the_shape_of_the_table(num_rows, dims, seed):
    dim, part_dim = dims
    table = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)
    table[0] = 0.0
    code = ProductCodes.of(table, part_dim=part_dim)
    decoded = np.asarray(code.decode())
    assert decoded.shape == table.shape and not decoded[0].any()
    if num_rows <= NUM_CENTROIDS:  # a centroid an item: what is left is the rounding to float16
        np.testing.assert_allclose(decoded, table, rtol=2e-3, atol=1e-6)
    of_mean = np.square(table[1:] - table[1:].mean(0)).sum()
    assert np.square(decoded - table)[1:].sum() <= of_mean + 1e-4
    for name, (shape, dtype) in code.expected().items():
        assert code.arrays[name].shape == shape and code.arrays[name].dtype == dtype


def test_codes_are_those_of_the_nearest_centroids():
    table = np.random.default_rng(1).normal(size=(700, 6)).astype(np.float32)
    code = ProductCodes.of(table, part_dim=3)
    parts = table.reshape(700, 2, 1, 3)
    distances = np.square(parts - code.centroids.astype(np.float32)).sum(-1)
    chosen = np.take_along_axis(distances, code.codes[..., None].astype(int), 2)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda table: Plain.of(table),
        lambda table: RowCodes.of(table, bits=8),
        lambda table: RowCodes.of(table, bits=4),
        lambda table: RowCodes.of(table, bits=4, group=4),
        lambda table: ProductCodes.of(table, part_dim=4),
    ],
)
def test_scores_of_codes_are_products_with_decoded_rows(make):
    rng = np.random.default_rng(2)
    table = rng.normal(size=(300, 12)).astype(np.float32)
    code, query = make(table), rng.normal(size=12).astype(np.float32)
    found = jax.jit(lambda code, query: code.scores(query))(code, query)  # a code is an argument of a program
    decoded = np.asarray(code.decode())
    np.testing.assert_allclose(found, decoded @ query, rtol=1e-4, atol=1e-4)
    ids = jnp.array([[0, 7], [299, 7]])
    np.testing.assert_array_equal(code.rows(ids), decoded[np.asarray(ids)])


def test_encoding_an_array_that_was_read_back_changes_nothing():
    rows = np.random.default_rng(3).normal(size=(20, 16)).astype(np.float32)
    code = RowCodes.of(rows, bits=8)
    decoded = code.decode()
    numbers, scale = nearest_int8(decoded)
    np.testing.assert_array_equal(numbers, code.values)
    np.testing.assert_allclose(numbers * scale, decoded, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_rows(np.array([[np.nan]], np.float32), bits=8, group=1)
    with pytest.raises(ValueError, match="float16 scale"):
        encode_rows(np.array([[1e8]], np.float32), bits=8, group=1)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        encode_rows(np.zeros((1, 1), np.float32), bits=5, group=1)
    with pytest.raises(ValueError, match="take one of 1, 2, 3, 6"):
        ProductCodes.of(np.zeros((3, 6), np.float32), part_dim=4)
    with pytest.raises(ValueError, match="no item"):
        ProductCodes.of(np.zeros((1, 6), np.float32), part_dim=2)
    with pytest.raises(ValueError, match="65504"):
        ProductCodes.of(np.full((3, 6), 1e6, np.float32), part_dim=2)
    with pytest.raises(ValueError, match="70000"):
        Plain.of(np.array([70000], np.int32), "uint16")
    with pytest.raises(ValueError, match="float16 does not"):
        Plain.of(np.array([1e6], np.float32), "float16")
