"""What an event's context columns become: a hash of column and value, the same in every run.

There is no vocabulary: a value that training has never seen has a number too, which the model folds into its rows.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32

from jaxrec.data.validate import as_text, is_text

__all__ = ["context_ids"]

_LARGEST = 2**31 - 2


def context_ids(column: pa.Array, name: str) -> Int32[np.ndarray, " e"]:
    """1 .. 2^31 - 1 by the value and the column's name; 0 = null.

    Raises:
      ValueError: the column is of a type that has no plain text.
    """
    kind = column.type
    if is_text(kind):
        column = as_text(column)[0]
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        column = pc.cast(column, pa.string())
    elif not pa.types.is_null(kind):
        raise ValueError(
            f"columns.context names {name!r}, which is of type {kind}; a context is text, a number or a truth value."
        )
    encoded = pc.dictionary_encode(column)
    numbers = np.array(
        [_number(f"{name}={value}") for value in encoded.dictionary.to_pylist()] + [0], np.int32
    )
    return numbers[np.asarray(encoded.indices.fill_null(len(numbers) - 1))]


def _number(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % _LARGEST
