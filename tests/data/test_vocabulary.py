"""Vocabularies: the same key has the same code, whatever the batches; ranks follow the keys."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.vocabulary import KeyIndex

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)


def as_keys(values, kind):
    return pa.array(values, pa.string()) if kind == "string" else np.array(values, kind)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int64", st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3)),
        ("uint64", st.integers(0, 2**64 - 1) | st.integers(0, 3)),
        ("string", TEXT),
    ],
)
def test_codes_are_one_to_one_and_ranks_sort_the_keys(kind, value):
    @given(st.lists(st.lists(value, max_size=8), min_size=1, max_size=5))
    def check(batches):
        index, codes = KeyIndex(), {}
        for batch in batches:
            if not batch:
                continue
            for key, code in zip(batch, index.add(as_keys(batch, kind)).tolist(), strict=True):
                assert codes.setdefault(key, code) == code
        assert sorted(codes.values()) == list(range(len(codes)))
        assert len(index) == len(codes)
        if not codes:
            return
        keys, rank = index.ranked()
        assert keys.to_pylist() == sorted(codes)
        assert {key: keys[int(rank[code])].as_py() for key, code in codes.items()} == {
            key: key for key in codes
        }
        assert index.keys_by_code() == sorted(codes, key=codes.__getitem__)

    check()
