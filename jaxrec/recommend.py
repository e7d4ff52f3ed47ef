"""Writes each user's recommendations: `python -m jaxrec.recommend --workdir=runs/quickstart --out=recs.parquet`.

One row an item: `user_id, item_id, rank, score`, in the ids of your own data, rank 1 = best. Items that a user has
seen are left out where the dataset says `filter_seen`. With `--group` one list for several users, with `group` in place
of `user_id`. The catalogue stays on the devices that own it, and users are
streamed: memory does not grow with their number.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import pyarrow as pa
from rich.console import Console

from jaxrec.config import run_directory
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import initialize_platform
from jaxrec.evaluation.arguments import add_run_arguments, positive
from jaxrec.evaluation.group_recommendations import (
    find_aggregation,
    find_groups,
    write_group_recommendations,
)
from jaxrec.evaluation.recommendations import (
    RecommendationCounts,
    find_users,
    read_user_ids,
    write_recommendations,
)
from jaxrec.evaluation.slates import Slate
from jaxrec.runs import Run, load_run


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    given = parse_arguments(arguments)
    start_logging()
    console = Console(stderr=True)
    try:
        initialize_platform()
        counts = recommend(given, console)
    except (ValueError, OSError) as error:
        return failed(error)
    if jax.process_index() == 0:
        report(given.out, counts, console)
    return 0


def recommend(given: argparse.Namespace, console: Console) -> RecommendationCounts:
    """Opens the run, finds the users, writes the file."""
    run = load_run(run_directory(given.workdir), mesh_shape=given.mesh_shape)
    user_indices = None
    if given.users:
        key_type = pa.array(run.dataset.user_keys[:1]).type
        user_indices, unknown = find_users(
            run.dataset, read_user_ids(given.users, key_type), skip_unknown=given.skip_unknown_users
        )
        if unknown:
            console.print(f"{len(unknown):,} unknown users skipped, e.g. {unknown[0]!r}", markup=False)
    kind = find_kind(run.dataset.metadata.kinds, given.kind)
    if given.group:
        return recommend_to_groups(run, given, kind)
    with jax.set_mesh(run.mesh):
        return write_recommendations(
            run,
            given.out,
            split=given.split or ("all" if given.users else "test"),
            k=given.k,
            rows_per_batch=given.batch_rows or run.config.evaluation.rows_per_batch,
            user_indices=user_indices,
            slate=find_slate(run.config.evaluation.slates, given.slate),
            kind=kind,
        )


def recommend_to_groups(run: Run, given: argparse.Namespace, kind: int) -> RecommendationCounts:
    """One list for each `--group`.

    Raises:
      ValueError: users or a slate are asked for beside groups, or there is no such user or aggregation.
    """
    for name in ("users", "slate"):
        if getattr(given, name):
            raise ValueError(
                f"--{name} and --group do not go together; ask for groups in a call of their own."
            )
    groups = find_groups(run.dataset, given.group)
    settings = run.config.evaluation
    with jax.set_mesh(run.mesh):
        num_rows = write_group_recommendations(
            run,
            given.out,
            groups,
            group=find_aggregation(settings.groups, given.aggregation),
            split=given.split or "all",
            k=given.k,
            rows_per_batch=given.batch_rows or settings.rows_per_batch,
            kind=kind,
        )
    num_users = len({user for members in groups.values() for user in members.tolist()})
    return RecommendationCounts(
        num_users=num_users, num_rows=num_rows, num_without_history=0, num_without_target=0
    )


def find_slate(slates: Mapping[str, Slate], name: str | None) -> Slate | None:
    """The slate of that name; None = plain lists.

    Raises:
      ValueError: the run's config has no such slate.
    """
    if name is not None and name not in slates:
        raise ValueError(
            f"--slate={name}: the run's evaluation.slates are {', '.join(slates) or 'none'}; name one of them, or "
            "train with one: --config.evaluation.slates.NAME=Slate."
        )
    return None if name is None else slates[name]


def find_kind(kinds: Sequence[str], name: str | None) -> int:
    """The number of a kind of items; the first one where none is named, 0 where all are of one.

    Raises:
      ValueError: the dataset has no such kind.
    """
    if name is None:
        return 1 if kinds else 0
    if name not in kinds:
        raise ValueError(f"--kind={name}: the dataset's kinds of items are {', '.join(kinds) or 'none'}.")
    return kinds.index(name) + 1


def report(out: Path, counts: RecommendationCounts, console: Console) -> None:
    """Says what was written and who was left out."""
    console.print(
        f"{counts.num_rows:,} recommendations for {counts.num_users:,} users: {out}",
        soft_wrap=True,
        markup=False,
    )
    if counts.num_without_history:
        console.print(f"{counts.num_without_history:,} users have no event to start from and were left out")
    if counts.num_without_target:
        console.print(f"{counts.num_without_target:,} users have no event in this split and were left out")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.recommend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser, required=True)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="Parquet, or CSV where the name ends in .csv"
    )
    parser.add_argument("--k", metavar="N", type=positive, default=10, help="items per user (default 10)")
    parser.add_argument(
        "--slate",
        metavar="NAME",
        help="sets chosen together, by this entry of evaluation.slates, in place of --k",
    )
    parser.add_argument(
        "--group",
        metavar="U1,U2,...",
        action="append",
        help="one list for these users together; may be given several times",
    )
    parser.add_argument(
        "--aggregation",
        metavar="NAME",
        help="how a group's list is made: an entry of evaluation.groups (default: the first, else the average)",
    )
    parser.add_argument(
        "--kind", metavar="NAME", help="which items, where they are of several kinds (default: the first)"
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation", "all"),
        help="whose history: before the test or validation target, or all events (default: test; all with --users or "
        "--group)",
    )
    parser.add_argument(
        "--users",
        metavar="FILE",
        type=Path,
        help="only these users: one id a line, or .csv / .parquet with a column user_id",
    )
    parser.add_argument(
        "--skip-unknown-users", action="store_true", help="go on without users that the dataset does not know"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
