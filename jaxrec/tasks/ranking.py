"""What tasks share that tell one item from the others, and that recommendations can be asked of."""

import dataclasses
from typing import Literal

from jaxrec.tasks.base import Task
from jaxrec.tasks.candidates import Candidates, FullSoftmax

QueryMode = Literal["causal", "masked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingTask(Task):
    """Base of the tasks that rank items.

    Attributes:
      candidates: what the item is told from.
      temperature: the scores are divided by it.
    """

    candidates: Candidates = FullSoftmax()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"{type(self).__name__}.temperature={self.temperature} must be above 0.")

    @property
    def query_mode(self) -> QueryMode:
        """How the model is asked: by the state of the last event, or by a mask put after it."""
        raise TypeError(f"{type(self).__name__} must define query_mode")

    @property
    def encodings(self) -> frozenset[str]:
        """One, of the task's mode."""
        return frozenset({self.query_mode})

    @property
    def takes_mixture(self) -> bool:
        """Where its candidates are a sample, and no temperature divides what is no product."""
        return not isinstance(self.candidates, FullSoftmax) and self.temperature == 1.0

    @property
    def takes_memory(self) -> bool:
        """Whether the loss adds the logits of the memory of transitions."""
        return False

    @property
    def needs_catalogue(self) -> bool:
        """As the candidates do."""
        return self.candidates.needs_catalogue
