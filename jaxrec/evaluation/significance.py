"""Is a difference more than luck? Intervals and paired tests over users.

A metric is a mean over users, so its uncertainty is that of drawing those users: resample users, with one value
per user (`metrics.ranking.per_user_metrics`). Two runs are compared on the same users, pair by pair, because the
spread between users is many times the difference between models. Training luck is another matter: it takes
several seeds, which no test on one run replaces.

All draws come from the seed and the number of users alone: the same input gives the same interval.

U = users (A, B = those of each run, before they are known to be the same), M = metrics, S = samples.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real, Shaped

__all__ = [
    "Comparison",
    "Interval",
    "align_users",
    "bootstrap_intervals",
    "by_user",
    "compare",
    "differences",
    "holm",
    "paired_comparison",
    "with_intervals",
]

CHUNK = 1 << 22  # draws in memory at one time


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over users and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Run B against run A on one metric, over the same users.

    Attributes:
      mean_a, mean_b: the metric of each run.
      difference: mean_b - mean_a.
      low, high: its paired bootstrap interval.
      p_value: two-sided, by sign flips; NaN-free, and never 0: at least 1 / (samples + 1).
      adjusted_p_value: after Holm's correction for all metrics of the comparison; p_value when alone.
      num_users: pairs.
      better, worse: users for whom B is better or worse; the others tie.
    """

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float
    num_users: int
    better: int
    worse: int


def by_user(values: Real[np.ndarray, " t"], users: Shaped[np.ndarray, " t"]) -> Float64[np.ndarray, " u"]:
    """One value a user where a user has several targets: the sum over them, over the mean number of targets.

    The mean over users is then the mean over targets, and what is resampled are users, whose targets are no
    independent draws. With one target a user the values are what they were, in the order of the users.
    """
    _, places = np.unique(users, return_inverse=True)
    sums = np.bincount(places, weights=values)
    return sums * (len(sums) / max(len(values), 1))


def bootstrap_intervals(
    values: Mapping[str, Real[np.ndarray, " u"]],
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of the means; all metrics see the same resampled users.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993.

    Raises:
        ValueError: no users, users that differ in number, or settings out of range.
    """
    if not values:
        return {}
    _check(num_samples, confidence)
    table = _stack(values)
    means = _bootstrap_means(table, num_samples, seed)
    low, high = np.quantile(means, _tails(confidence), axis=0)
    return {
        name: Interval(float(mean), float(low[column]), float(high[column]))
        for column, (name, mean) in enumerate(zip(values, table.mean(axis=0), strict=True))
    }


def with_intervals(values: Mapping[str, Real[np.ndarray, " u"]], **draws: Any) -> dict[str, Any]:
    """Means and intervals of a system's metrics, as the JSON of an evaluation has them; `draws` as above."""
    found = bootstrap_intervals(values, **draws)
    return {
        "metrics": {metric: one.mean for metric, one in found.items()},
        "intervals": {metric: [one.low, one.high] for metric, one in found.items()},
    }


def paired_comparison(
    values_a: Real[np.ndarray, " a"],
    values_b: Real[np.ndarray, " b"],
    *,
    num_samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """B - A per user: interval by paired bootstrap, p-value by the sign-flip permutation test.

    If A and B were the same but for luck, each user's difference would be as likely with the other sign. The
    p-value is the share of random sign patterns whose mean is at least as far from 0, the real one counted.
    Source: Fisher's randomization test; Smucker, Allan, Carterette, CIKM 2007 (for ranking metrics).

    Raises:
        ValueError: the runs differ in users, or there are none.
    """
    return compare({"": values_a}, {"": values_b}, num_samples=num_samples, confidence=confidence, seed=seed)[
        ""
    ]


def compare(
    metrics_a: Mapping[str, Real[np.ndarray, " a"]],
    metrics_b: Mapping[str, Real[np.ndarray, " b"]],
    *,
    num_samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """`paired_comparison` for each metric, with Holm's correction over the metrics.

    The values of both runs must be in the same order of users; see `align_users`.

    Raises:
        ValueError: the runs differ in metrics or users, or there are none.
    """
    _check(num_samples, confidence)
    if not metrics_a or metrics_a.keys() != metrics_b.keys():
        raise ValueError(
            f"run A has the metrics {sorted(metrics_a)}, run B {sorted(metrics_b)}; evaluate both with the "
            "same settings."
        )
    table_a = _stack(metrics_a)
    table_b = _stack({name: metrics_b[name] for name in metrics_a})
    if table_a.shape != table_b.shape:
        raise ValueError(
            f"run A has {len(table_a)} users, run B {len(table_b)}; a paired test needs the same users."
        )
    differences = table_b - table_a
    low, high = np.quantile(_bootstrap_means(differences, num_samples, seed), _tails(confidence), axis=0)
    p_values = _sign_flip_p_values(differences, num_samples, seed)
    adjusted = holm(p_values)
    return {
        name: Comparison(
            mean_a=float(table_a[:, m].mean()),
            mean_b=float(table_b[:, m].mean()),
            difference=float(differences[:, m].mean()),
            low=float(low[m]),
            high=float(high[m]),
            p_value=float(p_values[m]),
            adjusted_p_value=float(adjusted[m]),
            num_users=len(differences),
            better=int(np.count_nonzero(differences[:, m] > 0)),
            worse=int(np.count_nonzero(differences[:, m] < 0)),
        )
        for m, name in enumerate(metrics_a)
    }


def differences(
    metrics_a: Mapping[str, Real[np.ndarray, " a"]],
    metrics_b: Mapping[str, Real[np.ndarray, " b"]],
    **draws: Any,
) -> dict[str, dict[str, Any]]:
    """B less A with the interval, metric by metric, as the JSON of an evaluation has them; see `compare`."""
    return {
        metric: {"difference": one.difference, "interval": [one.low, one.high]}
        for metric, one in compare(metrics_a, metrics_b, **draws).items()
    }


def holm(p_values: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
    """P-values that hold for the whole family: reject where the adjusted value is under the level.

    Source: Holm, Scandinavian Journal of Statistics 1979 (step-down; needs no independence).
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def align_users(
    users_a: Shaped[np.ndarray, " a"], users_b: Shaped[np.ndarray, " b"]
) -> tuple[Int64[np.ndarray, " u"], Int64[np.ndarray, " u"]]:
    """Where the users of both runs stand in each, in the same order.

    Raises:
        ValueError: a run names a user twice, or the runs are not about the same users, or name them in two types.
    """
    for name, users in (("A", users_a), ("B", users_b)):
        if len(np.unique(users)) != len(users):
            raise ValueError(f"run {name} names a user twice; evaluate it again.")
    try:
        common, at_a, at_b = np.intersect1d(users_a, users_b, assume_unique=True, return_indices=True)
    except TypeError as error:  # numbers and texts have no order
        raise ValueError(
            f"run A has users such as {users_a.tolist()[0]!r}, run B such as {users_b.tolist()[0]!r}, of another type; "
            "evaluate both on the same data."
        ) from error
    if len(common) != max(len(users_a), len(users_b)):
        raise ValueError(
            f"run A has {len(users_a)} users, run B {len(users_b)}, and {len(common)} are in both; evaluate "
            "both on the same data and split, without a limit on users."
        )
    return at_a, at_b


def _bootstrap_means(
    table: Float64[np.ndarray, "u m"], num_samples: int, seed: int
) -> Float64[np.ndarray, "s m"]:
    """Means over resampled users: how often each user is drawn, times the values."""
    num_users = len(table)
    generator = np.random.default_rng([seed, 0])
    means = [
        np.stack([np.bincount(draws, minlength=num_users) for draws in drawn]) @ table / num_users
        for drawn in (
            generator.integers(0, num_users, (size, num_users), dtype=np.int32)
            for size in _chunk_sizes(num_samples, num_users)
        )
    ]
    return np.concatenate(means)


def _sign_flip_p_values(
    differences: Float64[np.ndarray, "u m"], num_samples: int, seed: int
) -> Float64[np.ndarray, " m"]:
    num_users = len(differences)
    generator = np.random.default_rng([seed, 1])
    total = differences.sum(axis=0)
    # Sums of the same numbers in another order differ in the last bits, and must still count as equal.
    reached = np.abs(total) * (1.0 - 1e-9)
    extreme = np.ones(differences.shape[1])
    for size in _chunk_sizes(num_samples, num_users):
        flipped = _coins(generator, size, num_users).astype(np.float64)
        extreme += np.count_nonzero(np.abs(total - 2.0 * (flipped @ differences)) >= reached, axis=0)
    return extreme / (num_samples + 1)


def _coins(generator: np.random.Generator, size: int, num_users: int) -> Bool[np.ndarray, "s u"]:
    """Fair coins, eight from a random byte."""
    packed = generator.integers(0, 256, (size, -(-num_users // 8)), dtype=np.uint8)
    return np.unpackbits(packed, axis=1, count=num_users).view(np.bool_)


def _chunk_sizes(num_samples: int, num_users: int) -> Iterator[int]:
    size = max(1, CHUNK // num_users)
    for first in range(0, num_samples, size):
        yield min(size, num_samples - first)


def _stack(values: Mapping[str, Real[np.ndarray, " u"]]) -> Float64[np.ndarray, "u m"]:
    sizes = {name: len(column) for name, column in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the metrics have different numbers of users: {sizes}.")
    if not next(iter(sizes.values())):
        raise ValueError("there are 0 users; a metric without users has no interval.")
    table = np.stack([np.asarray(column, np.float64) for column in values.values()], axis=1)
    if not np.isfinite(table).all():
        name = list(values)[int(np.flatnonzero(~np.isfinite(table).all(axis=0))[0])]
        raise ValueError(f"metric {name!r} has a value that is not finite; leave those users out.")
    return table


def _tails(confidence: float) -> list[float]:
    return [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0]


def _check(num_samples: int, confidence: float) -> None:
    if num_samples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"num_samples={num_samples}, confidence={confidence}: say num_samples >= 1 and "
            "0 < confidence < 1."
        )
