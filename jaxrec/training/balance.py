"""How several tasks share one model: what of each is minimised, and how their gradients become one.

K = tasks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.models.two_tower import LOG_VARIANCES
from jaxrec.tasks.base import Task

# The tasks and the microbatches of a step fold small numbers into its key.
_ORDERS = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """Base of the balances: the sum of the tasks' mean losses, each times its `weight`."""

    def weighed(self, tasks: Mapping[str, Task]) -> tuple[str, ...]:
        """The tasks for which the model holds a log variance."""
        return ()

    def passes(self, tasks: Mapping[str, Task]) -> list[tuple[str, ...]]:
        """The tasks by the backward pass that they share."""
        return [tuple(tasks)]

    def objective(
        self,
        name: str,
        task: Task,
        loss: Float[Array, ""],
        dense: Mapping[str, Any],
        *,
        targets: Float[Array, ""],
        all_targets: Float[Array, ""],
    ) -> Float[Array, ""]:
        """What a task adds to the sum that is minimised.

        Args:
          loss: its part of the task's mean over the global batch, from the microbatch at hand.
          targets, all_targets: summed weights of the task's targets in the microbatch and in the global batch.
        """
        return task.weight * loss

    def join(
        self, gradients: Sequence[Any], tasks: Mapping[str, Task], dense: Mapping[str, Any], key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The gradient of the dense parameters from those of the passes, and metrics.

        Args:
          gradients: of each pass, over the global batch.
          dense: the parameters themselves.
          key: of the step.
        """
        (gradient,) = gradients
        return gradient, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedWeights(Balance):
    """Every task counts by its own `weight`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UncertaintyWeights(Balance):
    """Weights that are learned with the model: a task whose loss stays high counts less.

    The sum of `w (exp(-s) L + s / 2)` over the tasks, with L a task's mean loss, w its `weight` and s its learned log
    variance, 0 at the start. For a given L the best s is log(2 L), so that every task ends up with a loss of w / 2.

    Source: Kendall, Gal and Cipolla, CVPR 2018 (homoscedastic uncertainty; the form for classification, which all
    losses in nats are). Deviations: `weight` multiplies the regulariser too, else s would undo it; and the regulariser
    is shared out over the targets, so that a batch without targets of a task leaves its s alone.
    """

    def weighed(self, tasks: Mapping[str, Task]) -> tuple[str, ...]:
        """All."""
        return tuple(tasks)

    def objective(
        self,
        name: str,
        task: Task,
        loss: Float[Array, ""],
        dense: Mapping[str, Any],
        *,
        targets: Float[Array, ""],
        all_targets: Float[Array, ""],
    ) -> Float[Array, ""]:
        """See the class."""
        log_variance = dense[LOG_VARIANCES][name]
        share = targets / jnp.maximum(all_targets, 1.0)
        return task.weight * (jnp.exp(-log_variance) * loss + 0.5 * log_variance * share)

    def join(
        self, gradients: Sequence[Any], tasks: Mapping[str, Task], dense: Mapping[str, Any], key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The gradient as it is; the weights that the losses had."""
        (gradient,) = gradients
        weights = {name: task.weight * jnp.exp(-dense[LOG_VARIANCES][name]) for name, task in tasks.items()}
        return gradient, {f"task_weight/{name}": weight for name, weight in weights.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSurgery(Balance):
    """PCGrad: where the gradients of two tasks conflict, each gives up what works against the other.

    It costs a backward pass for each task. Only dense parameters that more than one task moves take part: a head of
    one task has nobody to conflict with. The gradients of rows and of tables under a full softmax are the plain sum:
    apart, they would have to be exchanged, or held as large as the table, once for each task.

    Source: Yu et al., NeurIPS 2020 (projecting conflicting gradients). The projections are combinations of the
    gradients, so that they are found from the inner products alone.
    """

    def passes(self, tasks: Mapping[str, Task]) -> list[tuple[str, ...]]:
        """One each."""
        return [(name,) for name in tasks]

    def join(
        self, gradients: Sequence[Any], tasks: Mapping[str, Task], dense: Mapping[str, Any], key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The sum of the projected gradients, and how many pairs of tasks conflicted."""
        treedef = jax.tree.structure(gradients[0])
        leaves = [jnp.stack(parts) for parts in zip(*map(jax.tree.leaves, gradients), strict=True)]
        products = jnp.stack([inner_products(leaf) for leaf in leaves])
        movers = jnp.sum(jnp.diagonal(products, axis1=1, axis2=2) > 0, axis=1)
        shared = movers > 1
        gram = jnp.sum(jnp.where(shared[:, None, None], products, 0.0), axis=0)
        factors = surgery_factors(gram, jax.random.fold_in(key, _ORDERS))
        joined = [
            jnp.tensordot(jnp.where(shared[i], factors, 1.0), leaf, axes=1, precision="highest")
            for i, leaf in enumerate(leaves)
        ]
        conflicts = jnp.sum(jnp.triu(gram < 0, 1).astype(jnp.int32))
        return jax.tree.unflatten(treedef, joined), {"conflicting_pairs": conflicts}


def inner_products(gradients: Float[Array, "K *p"]) -> Float[Array, "K K"]:
    """Of the tasks' gradients with respect to one array."""
    dims = tuple(range(1, gradients.ndim))
    return jnp.tensordot(gradients, gradients, axes=(dims, dims), precision="highest")


def surgery_factors(gram: Float[Array, "K K"], key: jax.Array) -> Float[Array, "K"]:
    """What each task's gradient is multiplied with in the sum of all projected gradients.

    Args:
      gram: inner products of the gradients.
      key: of the orders in which a task meets the others.
    """
    tasks = jnp.arange(len(gram))
    orders = jax.vmap(lambda i: jax.random.permutation(jax.random.fold_in(key, i), len(gram)))(tasks)

    def projected(task: jax.Array, order: jax.Array) -> jax.Array:
        def meet(factors: jax.Array, other: jax.Array) -> tuple[jax.Array, None]:
            product = factors @ gram[:, other]
            conflict = (product < 0) & (other != task) & (gram[other, other] > 0)
            step = jnp.where(conflict, product / jnp.where(conflict, gram[other, other], 1.0), 0.0)
            return factors.at[other].add(-step), None

        return jax.lax.scan(meet, (tasks == task).astype(gram.dtype), order)[0]

    return jnp.sum(jax.vmap(projected)(tasks, orders), axis=0)
