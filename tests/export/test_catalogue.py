"""Own ids: what is a number, and what only looks like one."""

import pyarrow as pa
import pytest

from jaxrec.export.catalogue import Vocabulary


@pytest.mark.parametrize(
    "key", ["01", "007", "-0", "+1", " 1", "1_0", "\uff11", "\u00b2", "1.0", "", "-", str(2**63), "9" * 5_000]
)
def test_what_is_not_written_as_a_number_is_none(key):
    vocabulary = Vocabulary(pa.array([0, 1, 7, 10], pa.int64()))
    assert vocabulary.own(key) == key
    assert not vocabulary.id_of(vocabulary.own(key))


def test_numbers_as_text_are_found():
    keys = [1, -7, 2**63 - 1, -(2**63)]
    vocabulary = Vocabulary(pa.array(keys, pa.int64()))
    assert [vocabulary.id_of(vocabulary.own(str(key))) for key in keys] == [1, 2, 3, 4]
    assert Vocabulary(pa.array(["1", "01"])).own(1) == "1"
