"""One update, step by step; killed anywhere, the next call goes on with the step that was not finished.

1. A snapshot of the log, and where it is cut: `updates/000007/`.
2. The grown data are prepared, a run is started from the one that answers, and trained.
3. Both are compared on the held-out events; the decision is written.
4. Where the next model is not worse it is exported, by one rename.
5. The outcome joins the history, and directories that nobody needs any more go; old versions where that is asked for.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import TrainConfig, read_run_config, run_directory
from jaxrec.config.run import CONFIG_FILE
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.data.vocabulary import known_ids
from jaxrec.export.candidates import read_candidates
from jaxrec.export.catalogue import HISTORIES_FILE
from jaxrec.export.exporter import ExportOptions, export_run
from jaxrec.export.item_index import INDEX_FILE
from jaxrec.export.licence import licence_of
from jaxrec.export.manifest import Manifest
from jaxrec.runs import dataset_of_run, load_state
from jaxrec.serving.store import Store, read_log
from jaxrec.serving.versions import versions_in
from jaxrec.updating.comparison import Verdict, answering_state, compare_ranks, rank_held_out
from jaxrec.updating.grown_data import grown_config
from jaxrec.updating.history import Outcome, add_outcome, read_outcomes, standing, write_text
from jaxrec.updating.next_run import next_config
from jaxrec.updating.options import UpdateOptions
from jaxrec.updating.snapshot import (
    Log,
    Mark,
    Plan,
    clocked_seconds,
    discard,
    holds,
    plan_update,
    read_plan,
    write_snapshot,
)

__all__ = ["StoppedError", "Train", "update_once"]

logger = logging.getLogger(__name__)

DECISION_FILE, LOCK_FILE = "decision.json", "lock"
Train = Callable[[TrainConfig, Path], bool]
"""Trains a config in a workdir, or resumes it there; False = it was stopped."""


class StoppedError(Exception):
    """Training was stopped by SIGTERM; the same command goes on."""


def update_once(options: UpdateOptions, store: Store, train: Train) -> Outcome | None:
    """Makes the next update, or goes on with one that was killed; None = there is not enough that is new.

    Raises:
      ValueError: no run, no version, a version of another run, or a run that cannot go on with a log.
      BlockingIOError: another process updates the run.
      StoppedError: by SIGTERM, while it trained.
    """
    updates = options.updates
    with _only_one(options.workdir, updates):
        outcomes = read_outcomes(updates)
        _tidy(updates, outcomes)
        directory = updates / _name(len(outcomes) + 1)
        log = list(read_log(store, options.after))
        decision = directory / DECISION_FILE
        if not decision.is_file():
            if read_plan(directory) is not None and not holds(directory, log):
                logger.info(
                    "users were erased since update %s began: it begins anew without them", directory.name
                )
                discard(directory)
            plan = read_plan(directory) or _begin(options, directory, outcomes, store, log)
            if plan is None:
                return None
            outcome = _decide(options, directory, outcomes, plan, train)
            write_text(decision, outcome.to_json() + "\n")
        outcome = Outcome.from_json(decision.read_text(encoding="utf-8"))
        if outcome.promoted and not (options.model / outcome.version).exists():
            _promote(options, directory, outcome)
        add_outcome(updates, outcome)
        _tidy(updates, [*outcomes, outcome])
        if options.keep_versions:
            _remove_versions(options, [*outcomes, outcome])
        return outcome


def _begin(
    options: UpdateOptions, directory: Path, outcomes: Sequence[Outcome], store: Store, log: Log
) -> Plan | None:
    """Step 1."""
    numbers = np.array([number for number, _ in log], np.int64)
    read = outcomes[-1].last if outcomes else options.after
    unread = int(np.count_nonzero(numbers > read))
    if unread < options.least_events:
        logger.info(
            "%d events since the last look, of the %d that are waited for", unread, options.least_events
        )
        return None
    run, mark = standing(outcomes, Mark(number=options.after))
    source = _source(options, run)
    _check_version(options.model, source)
    base = _dataset_of(run_directory(options.workdir))
    seconds = np.array([event.seconds for _, event in log], np.int64)
    timestamps = clocked_seconds(numbers, seconds, mark, _last_seconds(base))
    plan = plan_update(numbers, timestamps, mark, holdout=options.holdout, least_events=options.least_events)
    if plan is None:
        logger.info("the new events are all of one second, so that none can be held out: more are waited for")
        return None
    write_snapshot(directory, plan, log, timestamps, store.items())
    logger.info("update %s: %d new events, %d more held out", directory.name, plan.new, plan.held_out)
    return plan


def _decide(
    options: UpdateOptions, directory: Path, outcomes: Sequence[Outcome], plan: Plan, train: Train
) -> Outcome:
    """Steps 2 and 3."""
    begun, processor = time.monotonic(), time.process_time()
    number = int(directory.name)
    run, _ = standing(outcomes, Mark())
    source, first = _source(options, run), run_directory(options.workdir)
    base = read_run_config(first)
    data = directory / "data"
    prepare(grown_config(base.data, _dataset_of(first), directory, plan.cut), data)
    if (directory / CONFIG_FILE).is_file():
        # A run that has begun goes on as it is, whatever the options are now.
        config = read_run_config(directory)
        config = dataclasses.replace(config, init_from=str(directory / config.init_from))
    else:
        grown = PreparedDataset.open(data)
        config = next_config(base, grown, plan, options, number=number, start=source)
    if not train(config, directory):
        raise StoppedError(f"{directory} was stopped while it trained; the same command goes on.")
    verdict = _compare(options, directory, source)
    before = _dataset_of(source).directory
    assert before is not None, "a run's data lie on disk"
    new_items, new_users = (
        _count_new(data, before, file, key)
        for file, key in (("items.parquet", "item_id"), ("users.parquet", "user_id"))
    )
    finished = datetime.datetime.now(datetime.UTC)
    version = f"{finished:%Y%m%dT%H%M%SZ}-update{number}" if verdict.not_worse else ""
    found = verdict.comparison
    return Outcome(
        number=number,
        promoted=verdict.not_worse,
        text=f"update {number}: {f'promoted as {version}' if version else 'the old model stays'}: {verdict}; "
        f"{config.num_train_steps:,} steps on {plan.new:,} new events; new: {new_items:,} items, {new_users:,} users",
        run=directory.name,
        version=version,
        trained_to=plan.number,
        trained_before=plan.cut,
        last=plan.last,
        new_events=plan.new,
        held_out_events=plan.held_out,
        new_items=new_items,
        new_users=new_users,
        num_train_steps=config.num_train_steps,
        metric=verdict.metric,
        targets=verdict.targets,
        users=found.num_users if found else 0,
        old=found.mean_a if found else 0.0,
        new=found.mean_b if found else 0.0,
        difference=found.difference if found else 0.0,
        low=found.low if found else 0.0,
        high=found.high if found else 0.0,
        p_value=found.p_value if found else 1.0,
        seconds=round(time.monotonic() - begun, 1),
        processor_seconds=round(time.process_time() - processor, 1),
        finished=finished.isoformat(timespec="seconds"),
    )


def _compare(options: UpdateOptions, directory: Path, source: Path) -> Verdict:
    config, dataset, setup, state = load_state(directory)
    with jax.set_mesh(setup.mesh):
        new = rank_held_out(config, dataset, setup, state, most_users=options.most_users)
        old_state = answering_state(source, config, dataset, setup)
        old = rank_held_out(config, dataset, setup, old_state, most_users=options.most_users)
    return compare_ranks(config, old, new, tolerance=options.tolerance, least_users=options.least_users)


def _promote(options: UpdateOptions, directory: Path, outcome: Outcome) -> None:
    """Step 4: a version like the one that answers: its lists as long, its numbers as wide, its artifacts.

    The licence is that of the version, too, which may have been given by hand; the quality is the paired test.

    Histories are those of the first run: the server has the log itself, and would see its events twice.
    """
    newest = versions_in(options.model)[-1]
    facts = Manifest.read(newest).facts
    first = run_directory(options.workdir)
    like = ExportOptions(
        version=outcome.version,
        k=facts["k"],
        dtype=facts["dtype"],
        saved_model=(newest / "saved_model").is_dir(),
        onnx=(newest / "onnx").is_dir(),
        histories=(newest / HISTORIES_FILE).is_file(),
        candidates=tuple(read_candidates(newest)),
        index=(newest / INDEX_FILE).is_file(),
        # A version of before licences were among the facts has none.
        data_licence=facts["data"].get("licence") or licence_of(read_run_config(first).data),
    )
    export_run(
        directory,
        options.model,
        like,
        measured={"update": _tested(outcome, read_run_config(directory).evaluation.confidence)},
        histories=_dataset_of(first),
        say=lambda text: logger.info("export: %s", text),
    )


def _tested(outcome: Outcome, confidence: float) -> dict[str, Any]:
    """The paired test, as the metrics file and the card of the version have it."""
    return {
        "metric": outcome.metric,
        "old": outcome.old,
        "new": outcome.new,
        "difference": outcome.difference,
        "interval": [outcome.low, outcome.high],
        "confidence": confidence,
        "p_value": outcome.p_value,
        "num_targets": outcome.targets,
        "num_users": outcome.users,
        "decision": outcome.text,
    }


def _check_version(model: Path, source: Path) -> None:
    """Raises ValueError where the version that answers was not exported from the run that an update starts from."""
    newest = versions_in(model)[-1]
    if newest == model:
        raise ValueError(
            f"{model} is a version, and a new one would lie beside it; name the directory of versions, {model.parent}, "
            "here and at the server."
        )
    facts = Manifest.read(newest).facts
    if method := facts.get("compression"):
        raise ValueError(
            f"the version {newest} was compressed by {method}, and an update exports what it has trained as it is; "
            f"export {source} without --compressed, or compress the runs yourself."
        )
    there = facts["data"]["fingerprint"]
    here = _dataset_of(source).metadata.fingerprint
    if there != here:
        raise ValueError(
            f"the version {newest} was trained on the data {there}, and {source}, which the update would start from, "
            f"on {here}; name the --workdir of the run that was exported, or export {source} again."
        )


def _source(options: UpdateOptions, run: str) -> Path:
    """The directory of the run that answers."""
    return options.updates / run if run else run_directory(options.workdir)


def _dataset_of(run: Path) -> PreparedDataset:
    return dataset_of_run(read_run_config(run), run)


def _last_seconds(dataset: PreparedDataset) -> int:
    """The time of the run's last event; the least there is where no time is known."""
    last = dataset.statistics["times"]["last"]
    return int(np.iinfo(np.int64).min if last is None else last)


def _count_new(data: Path, before: Path, file: str, key: str) -> int:
    keys, known = (pq.read_table(path / file, columns=[key])[key].to_numpy() for path in (data, before))
    return int(np.count_nonzero(known_ids(keys, known)[1:] == 0))


def _name(number: int) -> str:
    return f"{number:06d}"


def _tidy(updates: Path, outcomes: Sequence[Outcome]) -> None:
    """Removes the directories of updates that have ended, but the last one's and that of the model that answers."""
    run, _ = standing(outcomes, Mark())
    kept = {run, *(outcome.run for outcome in outcomes[-1:])}
    for outcome in outcomes:
        if outcome.run not in kept:
            shutil.rmtree(updates / outcome.run, ignore_errors=True)


def _remove_versions(options: UpdateOptions, outcomes: Sequence[Outcome]) -> None:
    """Removes the versions that earlier updates have exported, but the newest; the others are not ours."""
    exported = [outcome.version for outcome in outcomes if outcome.promoted]
    for version in exported[: -options.keep_versions]:
        place = options.model / version
        hidden = place.with_name(f".{version}")  # a server that looks meanwhile sees a whole version, or none
        with contextlib.suppress(FileNotFoundError):
            place.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _only_one(workdir: Path, updates: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when the process ends, however it ends."""
    read_run_config(run_directory(workdir))  # before a directory is made for a run that is not there
    updates.mkdir(exist_ok=True)
    with (updates / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{updates} is in use by another update; wait for it, or stop its process."
            ) from error
        yield
