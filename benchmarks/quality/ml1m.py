"""ML-1M, protocol A, ids only: `configs/ml1m.py` against the published systems and against itself without the memory.

    python benchmarks/quality/ml1m.py

The best replicable published figure is NDCG@10 .1857 (SASRec+ with 3,000 negatives, antklen/sasrec-bert4rec-recsys23).
"""

from __future__ import annotations

import dataclasses
import sys

import suite
from suite import Variant, record

PUBLISHED = 0.1857
MINUTES = 45.0
DATA = "ml-1m-sasrec"
WITH = Variant(name="ml1m", config="configs/ml1m.py", data=DATA)
WITHOUT = Variant(name="ml1m_sasrec", config="configs/ml1m_sasrec.py", data=DATA)


def main() -> int:
    """Trains what is missing, compares, checks."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    with_memory, without = (suite.run_variant(variant, given) for variant in (WITH, WITHOUT))
    comparison = suite.compare_variants(without, with_memory)
    bars = [
        suite.mean_bar(WITH.name, with_memory, PUBLISHED),
        suite.paired_bar("with the memory against without", comparison),
        suite.minutes_bar(WITH.name, with_memory, MINUTES),
    ]
    figures = {
        WITH.name: suite.summary(with_memory),
        WITHOUT.name: suite.summary(without),
        "paired": dataclasses.asdict(comparison),
    }
    return record.finish("quality_ml1m", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
