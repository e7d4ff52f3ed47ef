"""Tables that every device has whole: look-ups are local, gradients are summed over the devices.

Everything here runs inside `shard_map` and sees one device's part. What is summed has the size of the table, which is
small where this pays (`placement_planner`); the update then touches the rows that some device asked for, as anywhere.

T = ids of this device, R = rows, D = dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.embedding.exchange import SCOPE, OwnedGradients


def take_rows(table: Float[Array, "R D"], ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
    """Zeros for padding and past the last row."""
    real = (ids > 0) & (ids < table.shape[0])
    return table.at[jnp.where(real, ids, table.shape[0])].get(mode="fill", fill_value=0)


@jax.named_scope(SCOPE)
def sum_gradients(ids: Int[Array, "t"], gradients: Float[Array, "t D"], num_rows: int) -> OwnedGradients:
    """The complete gradients of the rows that a device asked for, alike on all devices."""
    real = (ids > 0) & (ids < num_rows)
    # How often a row was asked for travels with its gradient: a gradient of zero touches its row too.
    counted = jnp.concatenate([gradients, jnp.ones((ids.size, 1), gradients.dtype)], 1)
    local = jnp.zeros((num_rows, counted.shape[1]), gradients.dtype)
    local = local.at[jnp.where(real, ids, num_rows)].add(counted, mode="drop")
    summed = jax.lax.psum(local, ALL_AXES)
    untouched = summed[:, -1] == 0
    order = jnp.argsort(untouched, stable=True).astype(jnp.int32)
    fillers = num_rows + jnp.arange(num_rows, dtype=jnp.int32)
    return OwnedGradients(jnp.where(untouched[order], fillers, order), summed[order, :-1])
