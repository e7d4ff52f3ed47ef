"""Where things lie in a bundle, and the sizes that a server compiles for."""

import itertools
from collections.abc import Mapping
from typing import Any

USER_TOWER, ITEM_TOWER, BEHAVIOURS, VALUES = "user_tower", "item_tower", "behaviours", "values"
STABLEHLO = "stablehlo"  # one file a program, named as the program; and `sized_program`s
SAVED_MODEL = "saved_model/1"  # TensorFlow Serving wants a number below the model's directory
ONNX = "onnx"
ITEM_VECTORS_FILE, WEIGHTS_FILE = "item_vectors.safetensors", "weights.safetensors"
WEIGHT_FILES = (ITEM_VECTORS_FILE, WEIGHTS_FILE)
CONFIG_FILE, METRICS_FILE, CARD_FILE = "config.json", "metrics.json", "MODEL_CARD.md"

# What a server compiles. It is written for each of these sizes and one platform, too: to put numbers in the place of
# letters and of the platform, JAX holds the interpreter, and with it every request.
SIZED_PLATFORM = "cpu"
SIZED_PROGRAMS = (USER_TOWER, BEHAVIOURS, VALUES)
SERVED_PROGRAMS = (*SIZED_PROGRAMS, ITEM_TOWER)
BATCH_SIZES = (1, 4, 16)
SHORTEST_HISTORY = 32
MOST_CANDIDATES = 256  # of a user, that the task heads judge at a time


def history_lengths(most: int) -> tuple[int, ...]:
    """Each twice as long as the one before, up to the longest that the model reads."""
    sizes = [SHORTEST_HISTORY]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 2)
    return (*(size for size in sizes if size < most), most)


def num_candidates(num_items: int) -> int:
    """The one size of candidates that task heads are compiled for: a power of two, no larger than it need be.

    One, as most of their work is the encoder's, over the history: 256 take as long as 32 with a plain head, and one and
    a half times as long with a PLE; 1,024 would take up to four times as long.
    """
    return min(MOST_CANDIDATES, 1 << max(num_items - 1, 0).bit_length())


def known_sizes(name: str, facts: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Users, events and, of task heads, candidates: what a server asks a program with, the largest last."""
    if name not in SIZED_PROGRAMS:
        return []
    candidates = () if name == USER_TOWER else (num_candidates(facts["num_items"]),)
    sizes = itertools.product(BATCH_SIZES, history_lengths(facts["max_events"]))
    return [(*size, *candidates) for size in sizes]


def sized_program(name: str, *sizes: int) -> str:
    """The file of a program that takes just this many users, events and candidates, on `SIZED_PLATFORM`."""
    return f"{name}.{'x'.join(map(str, sizes))}"
