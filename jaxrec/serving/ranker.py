"""The ranking stage: what a version's task heads say of the candidates, for a formula such as `click * buy^0.5`.

A column is a behaviour's probability, by the behaviour's name, or the predicted number, `value`. Heads are asked only
where a formula names one, for the candidates that stand highest by the model's score, in a thread of their own.
B = users, L = events, C = candidates, P = items of a pool, K = behaviours.
"""

import asyncio
import dataclasses
import keyword
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxrec.export.bundle import Bundle
from jaxrec.export.candidates import METHODS
from jaxrec.export.events import UserEvents
from jaxrec.export.layout import BATCH_SIZES, BEHAVIOURS, VALUES, num_candidates
from jaxrec.serving.batcher import Batcher
from jaxrec.serving.candidates import COLUMNS, Candidates
from jaxrec.serving.version import History, Version

__all__ = ["VALUE", "Judged", "Needs", "Ranked", "Ranker", "ToJudge", "head_columns", "judge"]

VALUE = "value"  # the column of predicted numbers
_OUTPUTS = {BEHAVIOURS: "probabilities", VALUES: "values"}

Judged = Mapping[str, Float[np.ndarray, " c"]]  # by column


@dataclasses.dataclass(frozen=True, eq=False)
class ToJudge:
    """A user's candidates.

    Attributes:
      item_ids: at most `Ranker.most`; 0 = an item without a row, of which the answer means nothing.
    """

    history: History
    item_ids: Int[np.ndarray, " c"]


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """A pool, and what the heads say of the first of it.

    Attributes:
      pool: in the order of the model's score.
      judged: columns of its first C places; {} = the heads have said nothing.
    """

    pool: Candidates
    judged: Judged

    @property
    def count(self) -> int:
        """C."""
        return min(map(len, self.judged.values()), default=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What the options of a server ask of every version.

    Attributes:
      columns: names in the formula.
      sources: of candidates, beside the model.
    """

    columns: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()

    def check(self, version: Version) -> None:
        """Raises ValueError where the version lacks something; it says what, and what to do."""
        heads = head_columns(version.bundle)
        missing = sorted((self.columns | self.sources) & METHODS.keys() - version.others.keys())
        if missing:
            raise ValueError(
                f"version {version.name} was exported without candidates of {missing[0]}, which --formula or "
                f"--candidates names; it has {', '.join(version.others) or 'none'}. Export it with "
                f"--candidates={missing[0]}, or do without."
            )
        unknown = sorted(self.columns - {*COLUMNS, *heads})
        if unknown:
            there = [name for name in COLUMNS if name not in METHODS or name in version.others]
            raise ValueError(
                f"--formula names {unknown[0]!r}, and version {version.name} has {', '.join((*there, *heads))}; name "
                "one of these, or export a run with a task that learns it."
            )

    def ranker(self, version: Version) -> "Ranker | None":
        """The heads that the formula names, compiled; None = it names none."""
        heads = head_columns(version.bundle)
        wanted = {name: heads[name] for name in self.columns if name in heads}
        return Ranker(version, wanted) if wanted else None


class Ranker:
    """Task heads of a version, compiled for a few fixed sizes.

    Attributes:
      most: candidates of a user that are judged at a time.
    """

    def __init__(self, version: Version, columns: Mapping[str, tuple[str, int]]):
        """Compiles every size.

        Args:
          columns: that are wanted, as `head_columns` gives them.
        """
        self._version, self._columns = version, columns
        self._programs = {name: version.bundle.program(name) for name, _ in columns.values()}
        self.most = num_candidates(version.num_items)
        for num_rows in BATCH_SIZES:
            for length in version.lengths:
                history = History(UserEvents.of_items(np.ones(length, np.int64)))
                asked = [ToJudge(history, np.ones(self.most, np.int64))] * num_rows
                for name, program in self._programs.items():
                    program.warm_up(self._inputs(name, asked, num_rows, length))

    def judge(self, asked: Sequence[ToJudge]) -> list[Judged]:
        """The columns of each user's candidates; users with histories of about the same length at a time."""
        found: dict[int, Judged] = {}
        for rows, num_rows, length in self._version.batches([one.history for one in asked]):
            group = [asked[row] for row in rows]
            outputs = {
                name: jax.device_get(program(self._inputs(name, group, num_rows, length))[_OUTPUTS[name]])
                for name, program in self._programs.items()
            }
            for place, (row, one) in enumerate(zip(rows, group, strict=True)):
                own = {name: array[place, : len(one.item_ids)] for name, array in outputs.items()}
                found[row] = {
                    column: own[name][:, index] if name == BEHAVIOURS else own[name]
                    for column, (name, index) in self._columns.items()
                }
        return [found[row] for row in range(len(asked))]

    def _inputs(
        self, program: str, asked: Sequence[ToJudge], num_rows: int, length: int
    ) -> dict[str, np.ndarray]:
        inputs = self._version.inputs(program, [one.history for one in asked], num_rows, length)
        candidate_ids = inputs["candidate_ids"] = np.zeros((num_rows, self.most), np.int32)
        for row, one in enumerate(asked):
            candidate_ids[row, : len(one.item_ids)] = one.item_ids
        for array in self._version.bundle.manifest.programs[program]["inputs"]:
            if array["name"] == "candidate_context":
                # Nobody says in which context a list will be read: it is unknown.
                inputs["candidate_context"] = np.zeros((*candidate_ids.shape, array["dims"][-1]), np.int32)
        return inputs


def head_columns(bundle: Bundle) -> dict[str, tuple[str, int]]:
    """What a formula may name of a version's heads: the program, and the place among its outputs.

    What is no letter, digit or _ in a behaviour's name is written _; a name that means something else already is not
    to be had.
    """
    programs, facts = bundle.manifest.programs, bundle.facts
    found: dict[str, tuple[str, int]] = {}
    if BEHAVIOURS in programs:
        # Of a behaviour that no task has learnt the head says nothing.
        learned = facts.get("learned_behaviours", facts["behaviours"])
        for index, behaviour in enumerate(facts["behaviours"]):
            name = re.sub(r"\W|^(?=\d)", "_", behaviour)
            name += "_" * keyword.iskeyword(name)
            if behaviour in learned and name not in COLUMNS:
                found.setdefault(name, (BEHAVIOURS, index))
    if VALUES in programs:
        found.setdefault(VALUE, (VALUES, 0))
    return found


async def judge(
    ranker: Batcher[ToJudge, Judged],
    version: Version,
    history: History,
    item_ids: Int[np.ndarray, " c"],
    deadline: float,
) -> Judged:
    """The columns of a user's candidates, any number of them; {} where none has a row.

    An item that has come in since the version was made has no row: it is taken for the middle of the user's other
    candidates, the median of each column, so that the rest of the formula says where it stands.

    Args:
      item_ids: of the view.
      deadline: by `time.monotonic()`.

    Raises:
      Expired, Overloaded, Closed: of the batcher.
    """
    has_row = item_ids <= version.num_items
    if not has_row.any():
        return {}
    ids = np.where(has_row, item_ids, 0)
    most = num_candidates(version.num_items)
    parts = await asyncio.gather(
        *(
            ranker.submit(ToJudge(history, ids[start : start + most]), deadline=deadline)
            for start in range(0, len(ids), most)
        )
    )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: np.where(has_row, column, np.median(column[has_row])) for name, column in whole.items()}
