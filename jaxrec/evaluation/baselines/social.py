"""Counting along edges between users: friends of friends, users of the same taste, and what friends take.

Of a data set whose users are items, too (`data.social`): row `i` of the training histories is user `i`, who is item
`people[i]`. Each of them is a matrix of weights from item to item, as ItemKNN is: of the friends, or items, of a
history, to whom or what is recommended.

U = users, V = num_items + 1.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Int32

from jaxrec.data.dataset import Histories
from jaxrec.evaluation.baselines.base import Baseline, ItemWeights, interactions

__all__ = ["AdamicAdar", "CommonNeighbours", "FriendsItems", "ProfileCosine", "social_baselines"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Social:
    """Base: who is which item.

    Attributes:
      people: the item that each user is; 0 = none.
    """

    people: Int32[np.ndarray, " u"]

    def edges(self, train: Histories, num_items: int) -> sparse.csr_array:
        """Row = a user as an item, column = a friend of theirs; `[V, V]` ones."""
        known = self.taken(train, num_items)
        is_person = np.zeros(num_items + 1, np.float32)
        is_person[self.people] = 1.0
        is_person[0] = 0.0
        known = known.multiply(is_person[None, :]).tocoo()
        # A product with a mask keeps the zeros, which would count as friends.
        friends = (known.row != known.col) & (known.data > 0)
        return sparse.csr_array((known.data[friends], (known.row[friends], known.col[friends])), known.shape)

    def taken(self, train: Histories, num_items: int) -> sparse.csr_array:
        """Row = a user as an item, column = what the training history holds; `[V, V]` ones."""
        by_user = interactions(train, num_items).tocoo()
        rows = self.people[by_user.row]
        there = rows > 0
        shape = (num_items + 1, num_items + 1)
        return sparse.csr_array((by_user.data[there], (rows[there], by_user.col[there])), shape=shape)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CommonNeighbours(_Social):
    """How many of one's friends are the candidate's friends.

    Source: Liben-Nowell & Kleinberg, JASIST 2007.
    """

    def fit(self, train: Histories, num_items: int) -> ItemWeights:
        """The edges themselves: a history's friends, one step on."""
        return ItemWeights(self.edges(train, num_items))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdamicAdar(_Social):
    """The same, a common friend who has many friends counting less: 1 / log of their number.

    A friend of one friend alone would divide by 0; as one of two it counts 1 / log 2.

    Source: Adamic & Adar, Social Networks 2003.
    """

    def fit(self, train: Histories, num_items: int) -> ItemWeights:
        """Each row over the logarithm of its degree."""
        edges = self.edges(train, num_items)
        degrees = np.diff(edges.indptr)
        weights = (1.0 / np.log(np.maximum(degrees, 2))).astype(np.float32)
        edges.data *= np.repeat(weights, degrees)
        return ItemWeights(edges)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProfileCosine(_Social):
    """Cosine of what the two users take, friends left out."""

    def fit(self, train: Histories, num_items: int) -> ItemWeights:
        """From an item to each user who takes it, over the length of that profile; one's own changes no order."""
        taken = self.taken(train, num_items)
        is_item = np.ones(num_items + 1, np.float32)
        is_item[self.people] = 0.0
        profiles = taken.multiply(is_item[None, :]).tocsr()
        profiles.eliminate_zeros()
        sizes = np.diff(profiles.indptr)
        profiles.data /= np.repeat(np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32)
        return ItemWeights(profiles.T.tocsr())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FriendsItems(_Social):
    """How many of one's friends take the item."""

    def fit(self, train: Histories, num_items: int) -> ItemWeights:
        """From a person to what they take; the own items, which the history holds anyway, come with the user."""
        return ItemWeights(self.taken(train, num_items))


def social_baselines(people: Int32[np.ndarray, " u"], *, of_people: bool) -> Mapping[str, Baseline]:
    """Those that rank people, or those that rank the other items, by the name that they are reported under."""
    if not of_people:
        return {"friends_items": FriendsItems(people=people)}
    return {
        "common_neighbours": CommonNeighbours(people=people),
        "adamic_adar": AdamicAdar(people=people),
        "profile_cosine": ProfileCosine(people=people),
    }
