"""Baselines: what a model has to beat, printed beside it every time.

Popularity and a table of counts beat many published models, so they run in every evaluation, on the same
targets, the same masks and the same order of ties.

A baseline is a frozen dataclass whose fields are its hyper-parameters. One set of them serves every data
set: they were chosen on the validation targets of MovieLens-latest-small and ML-1M together (and, but for EASE, of
Amazon Beauty; the transitions on Sports as well), and nothing here looks at a data set's name.

    fitted = EASE().fit(histories, num_items)     # histories: the training part of every user
    fitted.scores(queries)                        # float32 [Q, num_items + 1]; column 0 = padding = -inf

    results = evaluate_baselines(dataset, "test")                     # all of DEFAULT_BASELINES
    results.ranks["ease"]                         # int64 [U]: the rank of each user's target
    results.user_indices                          # int64 [U]: whose; the same for every baseline
    results.recommended["ease"]                   # int32 [U, T]: top T, where num_recommended=T was asked
    results.refused                               # {"ease": "why it did not run"}; nothing vanishes silently
    results.seconds["ease"]

    WindowPopularity().ranks(dataset, "test")     # of the moment of each target; what it may know is its own

Baselines are fitted on the training part alone; the query of a test target is everything before it. With
`fit_with_validation=True` the fit sees the validation events, too, as some papers do: say so beside the
numbers.

Q = queries, U = users, T = recommended items.
"""

from jaxrec.evaluation.baselines.base import Baseline, BaselineRefusedError, Fitted
from jaxrec.evaluation.baselines.ease import EASE
from jaxrec.evaluation.baselines.evaluate import (
    DEFAULT_BASELINES,
    BaselineResults,
    evaluate_baselines,
)
from jaxrec.evaluation.baselines.ials import IALS
from jaxrec.evaluation.baselines.item_knn import ItemKNN
from jaxrec.evaluation.baselines.popularity import Popularity, RecentPopularity
from jaxrec.evaluation.baselines.transition import Transition
from jaxrec.evaluation.baselines.window_popularity import WindowPopularity

__all__ = [
    "DEFAULT_BASELINES",
    "EASE",
    "IALS",
    "Baseline",
    "BaselineRefusedError",
    "BaselineResults",
    "Fitted",
    "ItemKNN",
    "Popularity",
    "RecentPopularity",
    "Transition",
    "WindowPopularity",
    "evaluate_baselines",
]
