"""Ids that say which domain they are of: `beauty:123` is item or user 123 of beauty."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32

__all__ = ["SEPARATOR", "domain_keys", "domains_of"]

SEPARATOR = ":"


def domain_keys(domain: str, ids: np.ndarray | pa.Array, bad: Bool[np.ndarray, " e"]) -> pa.Array:
    """The ids of a domain's own source as ids among all domains; null where `bad`."""
    text = ids if isinstance(ids, pa.Array) else pc.cast(pa.array(ids), pa.string())
    keys = pc.binary_join_element_wise(pa.scalar(domain), text, SEPARATOR)
    return pc.if_else(pa.array(bad), pa.scalar(None, pa.string()), keys)


def domains_of(keys: pa.Array, domains: Sequence[str]) -> Int32[np.ndarray, " e"]:
    """The domain of each key: 1, 2, ... in the order of `domains`.

    Raises:
      ValueError: a key is of none of them.
    """
    names = pc.list_element(pc.split_pattern(keys, SEPARATOR, max_splits=1), 0)
    found = pc.index_in(names, value_set=pa.array(list(domains), pa.string()))
    if found.null_count:
        at = pc.index(found.is_null(), True).as_py()
        raise ValueError(
            f"the id {keys[at].as_py()!r} is of none of the domains {', '.join(domains)}; the dataset is damaged: run "
            "python -m jaxrec.prepare again."
        )
    return np.asarray(found, np.int32) + np.int32(1)
