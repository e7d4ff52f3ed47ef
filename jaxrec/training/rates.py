"""How fast each parameter moves: factors of the learning rate, by the parameters' dotted paths.

A factor of 0 freezes: such a parameter keeps its bits, no gradient of it is taken, and no norm counts it.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxrec.nn.lora import adapter_of
from jaxrec.training.optimizer import OptimizerConfig

Tree = Any
# A block's path: the encoder that it is of, and its number from below.
BLOCK = re.compile(r"(?P<encoder>(?:.+\.)?encoder)\.blocks\.(?P<number>\d+)\.")
# What stands beside an encoder and feeds its first block; all else beside it stands above its last one.
INPUTS = frozenset(
    {"event_in", "user_in", "mask_vector", "time_gap_table", "behaviour_table", "token_table", "type_table"}
)
SHOWN_PATHS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Factors of the learning rate; 0 = frozen.

    Attributes:
      dense: a tree like that of the dense parameters.
      tables: by name.
    """

    dense: Tree
    tables: Mapping[str, float]

    def trained(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """What belongs to the tables that are not frozen."""
        return {name: value for name, value in tables.items() if self.tables[name]}

    def stop_gradients(self, dense: Tree, *by_table: Mapping[str, Tree]) -> tuple[Tree, ...]:
        """The same values, of which the frozen ones have a gradient of zero, for which nothing is computed."""
        stop = lambda rate, value: value if rate else jax.lax.stop_gradient(value)  # noqa: E731
        tables = ({name: stop(self.tables[name], value) for name, value in one.items()} for one in by_table)
        return jax.tree.map(stop, self.dense, dense), *tables

    def step(self, dense: Tree, updates: Tree) -> Tree:
        """The parameters, moved by the scaled updates. The frozen ones are not even added to: -0.0 + 0.0 is 0.0."""

        def move(rate: float, x: jax.Array, update: jax.Array) -> jax.Array:
            return x + (update if rate == 1 else rate * update).astype(x.dtype) if rate else x

        return jax.tree.map(move, self.dense, dense, updates)

    def average(self, averages: Tree, current: Tree, memory: jax.Array) -> Tree:
        """Exponential averages `{"dense": ..., "tables": ...}`; a frozen parameter is its own, to the last bit."""
        rates = {"dense": self.dense, "tables": {name: self.tables[name] for name in averages["tables"]}}
        mix = lambda rate, a, x: a * memory + x * (1 - memory) if rate else a  # noqa: E731
        return jax.tree.map(mix, rates, averages, current)

    def summary(self) -> list[str]:
        """A line for each factor other than 1: what has it."""
        by_rate: dict[float, list[str]] = {}
        for path, rate in (by_path(self.dense) | dict(self.tables)).items():
            by_rate.setdefault(rate, []).append(path)
        return [
            f"{'frozen' if not rate else f'learning rate x {rate:g}'}: {shown(paths)}"
            for rate, paths in sorted(by_rate.items())
            if rate != 1
        ]


def make_rates(
    config: OptimizerConfig, dense: Tree, tables: Iterable[str], *, frozen: tuple[str, ...] = ()
) -> Rates:
    """The factors of a model's parameters: `config.rates` times what `config.layer_decay` says.

    A kernel with an adapter is frozen.

    Args:
      dense: the dense parameters, or anything of their tree.
      tables: names.
      frozen: prefixes of paths that the model itself freezes.

    Raises:
      ValueError: a pattern matches nothing, or everything is frozen.
    """
    paths, tables = list(by_path(dense)), list(tables)
    factors = dict.fromkeys([*paths, *tables], 1.0)
    for pattern, factor in config.rates.items():
        factors |= dict.fromkeys(matching(pattern, factors, f"optimizer.rates[{pattern!r}]={factor}"), factor)
    for path, factor in layer_factors(paths, config.layer_decay).items():
        factors[path] *= 0.0 if adapter_of(path) in factors or path.startswith(frozen) else factor
    if not any(factors.values()):
        raise ValueError(
            f"optimizer.rates={dict(config.rates)} freezes every parameter; leave one to be trained."
        )
    of_path = lambda path, _: factors[path_name(path)]  # noqa: E731
    return Rates(
        dense=jax.tree_util.tree_map_with_path(of_path, dense),
        tables={name: factors[name] for name in tables},
    )


def matching(pattern: str, paths: Iterable[str], setting: str) -> list[str]:
    """The paths that a glob pattern matches; `*` goes across dots.

    Raises:
      ValueError: there are none; the message begins with `setting` and lists what there is.
    """
    found = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    if not found:
        raise ValueError(f"{setting} matches no parameter; there are {', '.join(paths)}.")
    return found


def layer_factors(paths: Iterable[str], decay: float) -> dict[str, float]:
    """`decay ** depth` of each path. Depth is 0 above an encoder, 1 in its last block, one more in each below it.

    What feeds the first block of n (positions, the maps and vectors of events, token tables) has n + 1.

    Source: Howard and Ruder, ACL 2018 (discriminative fine-tuning); Clark et al., ICLR 2020 (as a power of depth).
    """
    paths = list(paths)
    blocks: dict[str, int] = {}
    for found in filter(None, map(BLOCK.match, paths)):
        blocks[found["encoder"]] = max(blocks.get(found["encoder"], 0), int(found["number"]) + 1)

    def depth(path: str) -> int:
        if block := BLOCK.match(path):
            return blocks[block["encoder"]] - int(block["number"])
        for encoder, count in blocks.items():
            if path.startswith(f"{encoder}.") and not path.startswith(f"{encoder}.final_norm."):
                return count + 1
            beside = path.removeprefix(encoder.removesuffix("encoder"))
            if beside.split(".")[0] in INPUTS:
                return count + 1
        return 0

    return {path: decay ** depth(path) for path in paths}


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves by dotted path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: Any) -> str:
    """The dotted form of a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def shown(paths: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(paths) - SHOWN_PATHS
    return ", ".join(paths[:SHOWN_PATHS]) + (f" and {more} more" if more > 0 else "")
