"""Learns how a server should blend candidates: `python -m jaxrec.blend --workdir=runs/mine --model=exports/mine/v1`.

Gathers each user's candidates as the server would, learns on the validation events which weights make what users took
next most likely, and holds the blend against the model alone on the test events. Prints the formula, and writes it
where --out says:

    python -m jaxrec.export --workdir=runs/mine --out=exports/mine --candidates=item_knn --candidates=ials
    python -m jaxrec.blend --workdir=runs/mine --model=exports/mine/v1 --candidates=item_knn=200 --out=blend.txt
    python -m jaxrec.serve --model=exports/mine --candidates=item_knn=200 --formula=@blend.txt
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from jaxrec.config import read_run_config, run_directory
from jaxrec.core.files import write_whole
from jaxrec.core.log import failed, start_logging
from jaxrec.evaluation.arguments import positive
from jaxrec.evaluation.baselines.evaluate import split_queries
from jaxrec.evaluation.significance import Comparison, paired_comparison
from jaxrec.runs import dataset_of_run
from jaxrec.serving.blending import choices, learn, ndcg
from jaxrec.serving.candidates import SOURCES, Sources
from jaxrec.serving.formula import Formula
from jaxrec.serving.version import Version


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    given = parse_arguments(arguments)
    start_logging()
    try:
        formula, found = blend(given)
        print(
            f"test NDCG@10 of {found.num_users:,} users: model alone {found.mean_a:.4f}, blended {found.mean_b:.4f}, "
            f"difference {found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        )
        print(formula.text)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(given.out, formula.text + "\n")
    except (ValueError, OSError) as error:
        return failed(error)
    return 0


def blend(given: argparse.Namespace) -> tuple[Formula, Comparison]:
    """The formula, and the blend against the model alone on the test events, by NDCG@10.

    Raises:
      ValueError: the version is of other data than the run, or there is nothing to learn from.
    """
    workdir = run_directory(given.workdir)
    dataset = dataset_of_run(read_run_config(workdir), workdir)
    version = Version.open(given.model)
    facts = version.bundle.facts
    if facts["data"]["fingerprint"] != dataset.metadata.fingerprint:
        raise ValueError(
            f"{given.model} was exported from other data than those of {given.workdir}; export that run."
        )
    sources = Sources.parse(given.candidates)
    names = ["score", *version.others, "likeness", "content", "popularity"]
    users = np.random.default_rng(given.seed).permutation(len(dataset.lengths))[: given.users]
    of_split = {
        split: choices(
            version,
            sources,
            split_queries(dataset, split, users),
            names,
            pool=given.pool,
            seen=not facts["filter_seen"],
        )
        for split in ("validation", "test")
    }
    formula = learn(of_split["validation"], names)
    alone = ndcg(of_split["test"], Formula.parse("score", names))
    blended = ndcg(of_split["test"], formula)
    return formula, paired_comparison(alone, blended)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.blend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--workdir", metavar="DIR", type=Path, required=True, help="the trained run: its data are learnt from"
    )
    add("--model", metavar="DIR", type=Path, required=True, help="the exported version")
    add(
        "--candidates",
        metavar="SOURCE=N",
        action="append",
        default=[],
        help=f"as the server will have them: {', '.join(SOURCES[1:])}",
    )
    add("--pool", metavar="N", type=positive, default=200, help="candidates of the model (default 200)")
    add("--users", metavar="N", type=positive, default=2_000, help="drawn at random (default 2000)")
    add("--seed", type=int, default=0)
    add("--out", metavar="FILE", type=Path, help="for serve --formula=@FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
