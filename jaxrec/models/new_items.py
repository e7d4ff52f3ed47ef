"""Rows for items without a training event, from what the items table says of them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowRegression:
    """Ridge regression of the trained rows on the items' features gives new items their rows.

    Nothing of it enters training: the rows of known items, and all else that is trained, are the same without it.

    Attributes:
      regularization: the penalty of the squared weights; features have rows of about length 1 in each of their parts.

    Source: Gantner et al., ICDM 2010 (factors of new items, mapped from their attributes).
    """

    regularization: float = 2.0

    def __post_init__(self) -> None:
        if not self.regularization > 0:
            raise ValueError(f"new_items.regularization={self.regularization} must be above 0.")
