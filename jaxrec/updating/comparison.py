"""The next model against the one that answers, on events that neither was trained on.

Both rank the same targets in the same grown catalogue: each held-out event, given all of its user's events before it,
as the server had them. The model that answers has fresh rows for items that came in since, as it has nothing learned of
them; where a model counts transitions, both count those of the grown data.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import TrainConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.significance import Comparison, by_user, paired_comparison
from jaxrec.evaluation.user_ranking import UserRanker, UserRanks
from jaxrec.metrics.ranking import per_user_metrics
from jaxrec.runs import run_of_state, start_from
from jaxrec.training.loop import first_state
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState
from jaxrec.training.text_refresh import with_dataset_texts

__all__ = ["Verdict", "answering_state", "compare_ranks", "rank_held_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the paired test says.

    Attributes:
      metric: that was compared.
      targets: held-out events with a past.
      comparison: B = the next model, A = the one that answers; None = there was nothing to compare on.
      least: what the lower end of the interval has to reach, at most 0.
      least_users: that an interval is believed of.
    """

    metric: str
    targets: int
    comparison: Comparison | None
    least: float
    least_users: int = 1

    @property
    def not_worse(self) -> bool:
        """Whether the next model may answer."""
        found = self.comparison
        return found is not None and found.num_users >= self.least_users and found.low >= self.least

    def __str__(self) -> str:
        """The numbers."""
        found = self.comparison
        if found is None:
            return "no held-out event has a past to predict it from"
        relation = "is at least" if found.low >= self.least else "is below"
        few = (
            f", of the {self.least_users} users that are asked for"
            if found.num_users < self.least_users
            else ""
        )
        interval = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        return (
            f"{self.metric} {found.mean_a:.4f} -> {found.mean_b:.4f} over {self.targets:,} held-out events of "
            f"{found.num_users:,} users{few}; difference {interval}, "
            f"whose lower end {relation} {self.least:+.4f}"
        )


def answering_state(source: Path, config: TrainConfig, dataset: PreparedDataset, setup: Setup) -> TrainState:
    """The model of the run in `source` over the grown data: what `config` starts from; call it under the mesh."""
    fresh = with_dataset_texts(setup, setup.init_state(), dataset)
    return first_state(setup, fresh, dataset, start_from(source, config, dataset, setup))


def rank_held_out(
    config: TrainConfig,
    dataset: PreparedDataset,
    setup: Setup,
    state: TrainState,
    *,
    most_users: int,
) -> UserRanks:
    """The ranks of the test part's events in the whole catalogue.

    Args:
      most_users: users that are asked about, drawn by `config.evaluation.seed`; each with all held-out events.
    """
    users = np.flatnonzero(dataset.lengths > dataset.validation_end)
    if len(users) > most_users:
        drawn = np.random.default_rng(config.evaluation.seed).permutation(len(users))[:most_users]
        users = users[np.sort(drawn)]
    with jax.set_mesh(setup.mesh):
        ranker = UserRanker(run_of_state(config, dataset, setup, state, int(jax.device_get(state.step))))
        rows = ranker.rows(
            "test",
            rows_per_batch=config.evaluation.rows_per_batch,
            user_indices=users,
            every_event=True,
        )
        ranks, _ = ranker.rank(rows)
    return ranks


def compare_ranks(
    config: TrainConfig, old: UserRanks, new: UserRanks, *, tolerance: float, least_users: int
) -> Verdict:
    """The paired test over users, each with the sum over the own targets.

    Args:
      tolerance: share of the old model's metric that the new one may lose, by the lower end of the interval.
      least_users: a bootstrap of a handful of users is too sure of itself.
    """
    evaluation = config.evaluation
    assert np.array_equal(old.targets, new.targets), "both are asked for the same"
    if not len(old):
        return Verdict(metric=evaluation.metric, targets=0, comparison=None, least=0.0)
    values_old, values_new = (
        by_user(_metrics(one, evaluation.ks)[evaluation.metric], one.user_indices) for one in (old, new)
    )
    comparison = paired_comparison(
        values_old, values_new, confidence=evaluation.confidence, seed=evaluation.seed
    )
    least = -tolerance * comparison.mean_a
    return Verdict(
        metric=evaluation.metric,
        targets=len(old),
        comparison=comparison,
        least=least,
        least_users=least_users,
    )


def _metrics(ranks: UserRanks, ks: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    return per_user_metrics(ranks.ranks, ks)
