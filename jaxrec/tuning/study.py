"""The trials: each a run of `jaxrec.train` in a process and a workdir of its own, judged on validation.

Optuna proposes the values (a tree-structured Parzen estimator) and stops trials whose validation lies below the median
of the others at the same step. All that it knows lies in a journal of JSON lines, from which a stopped search goes on:
a trial that was under way is tried again in its old workdir, where its run resumes.

Source: Akiba et al., KDD 2019 (Optuna); Bergstra et al., NeurIPS 2011 (the estimator).
"""

import dataclasses
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from jaxrec.config import TrainConfig, apply_overrides, load_config
from jaxrec.core.files import write_whole
from jaxrec.data.prepare import is_prepared, prepare
from jaxrec.training.writer import read_metrics
from jaxrec.tuning.space import Space

logger = logging.getLogger(__name__)

STUDY_FILE, SEARCH_FILE, BEST_FILE, LOG_FILE = "study.journal", "search.json", "best.json", "train.log"
TRAIN = (sys.executable, "-m", "jaxrec.train")
POLL_SECONDS = 0.5
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
# The search ends where so many trials in a row failed: the config is at fault then, not the values.
MAX_FAILURES = 3
# It does not begin where so many draws give no config: a field or a value is wrong then, or nothing fits together.
MAX_DRAWS = 200
WORKDIR = "workdir"  # attribute of a trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, and how.

    Attributes:
      config: file, and variant, as for training.
      overrides: `--config.FIELD=VALUE` for every trial.
      given: the space as it was written.
      num_trials: to end with.
      seed: of the proposals.
      train: the command of the training entry.
    """

    config: str
    overrides: Sequence[str]
    space: Space
    given: Sequence[str]
    workdir: Path
    num_trials: int
    seed: int
    train: Sequence[str] = TRAIN

    def config_of(self, values: dict[str, str]) -> TrainConfig:
        """The config of a trial; raises ValueError where values do not fit together."""
        return apply_overrides(load_config(self.config), [*self.overrides, *_as_overrides(values)])

    def command(self, values: dict[str, str], workdir: Path) -> list[str]:
        """What trains these values."""
        overrides = [*self.overrides, *_as_overrides(values)]
        return [*self.train, f"--config={self.config}", f"--workdir={workdir}", *overrides]

    def draw(self, trial: Trial) -> dict[str, str]:
        """The values that the sampler proposes, by their fields."""
        return {field: choice.suggest(trial, field) for field, choice in self.space.items()}

    def any_config(self) -> TrainConfig:
        """The config of the first values drawn that fit together: for all that is not searched.

        Raises:
          ValueError: the file holds no config, or none of `MAX_DRAWS` draws gives one.
        """
        config = load_config(self.config)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.seed))
        for _ in range(MAX_DRAWS):
            values = self.draw(draws.ask())
            try:
                return apply_overrides(config, [*self.overrides, *_as_overrides(values)])
            except ValueError as error:
                problem = error
        raise ValueError(
            f"none of {MAX_DRAWS} draws of the searched values fits the config; the last one, {_shown(values)}: "
            f"{problem}"
        )

    @property
    def shares_data(self) -> bool:
        """Whether all trials train on the same prepared data."""
        fields = (field.removeprefix("data.") for field in self.space if field.startswith("data."))
        return all(
            field in ("history_length", "windows", "train_users", "train_since", "replay_share")
            for field in fields
        )


def run_search(search: Search) -> Study:
    """Runs trials until `num_trials` have ended, those of earlier sittings counted.

    Raises:
      ValueError: the space does not fit the config, the workdir holds another search, or trial after trial fails.
    """
    config = search.any_config()
    if not config.evaluation.every_steps:
        raise ValueError(
            "evaluation.every_steps=0: trials are judged and stopped early by validation while they train; set "
            "--config.evaluation.every_steps."
        )
    if config.stages:
        raise ValueError(
            f"stages={', '.join(config.stages)} are several runs, and a trial is one; search the config of one of them."
        )
    _claim(search)
    shared = _shared_data(search, config)
    study = optuna.create_study(
        study_name="jaxrec",
        storage=JournalStorage(JournalFileBackend(str(search.workdir / STUDY_FILE))),
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    _try_again(study)
    # A sampler that starts anew in each sitting must not repeat the draws of the one before.
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(study.trials))
    failures = 0
    while len(study.get_trials(deepcopy=False, states=ENDED)) < search.num_trials:
        trial = study.ask()
        failures = 0 if _run_trial(search, study, trial, config.evaluation.metric, shared) else failures + 1
        if failures == MAX_FAILURES:
            raise ValueError(
                f"{failures} trials in a row failed; the log of the last one is {_workdir(search, trial) / LOG_FILE}."
            )
    return study


def best_trial(study: Study) -> FrozenTrial | None:
    """The best of the trials that came to their end; None where there is none."""
    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


def _as_overrides(values: dict[str, str]) -> list[str]:
    return [f"--config.{field}={text}" for field, text in values.items()]


def _shown(values: dict[str, str]) -> str:
    return " ".join(f"{field}={text}" for field, text in values.items())


def _claim(search: Search) -> None:
    """Keeps what is searched in the workdir, or makes sure that the search there is the same."""
    path = search.workdir / SEARCH_FILE
    new = {"config": search.config, "overrides": list(search.overrides), "space": sorted(search.given)}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); take another --workdir.") from error
        changed = [name for name in new if new[name] != old.get(name)]
        if changed:
            raise ValueError(
                f"{search.workdir} holds another search: {changed[0]} was {old.get(changed[0])}, and is "
                f"{new[changed[0]]}. Take another --workdir, or give the search's own values to go on with it."
            )
        return
    search.workdir.mkdir(parents=True, exist_ok=True)
    _write_json(path, new)


def _write_json(path: Path, body: dict[str, Any]) -> None:
    write_whole(path, json.dumps(body, indent=2) + "\n")


def _try_again(study: Study) -> None:
    """Trials that a kill left under way go back into the queue, each with its workdir."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if WORKDIR in trial.user_attrs:
            study.enqueue_trial(trial.params, user_attrs={WORKDIR: trial.user_attrs[WORKDIR]})


def _workdir(search: Search, trial: Trial) -> Path:
    return search.workdir / "trials" / str(trial.user_attrs[WORKDIR])


def _shared_data(search: Search, config: TrainConfig) -> list[str]:
    """Prepares the data once for all trials; the override that sends them there."""
    if not search.shares_data or (config.data.path and is_prepared(Path(config.data.path))):
        return []
    out = search.workdir / "data"
    prepare(config.data, out)
    return [f"--config.data.path={out}"]


def _run_trial(search: Search, study: Study, trial: Trial, metric: str, shared: list[str]) -> bool:
    """Trains a trial to its end or until it is pruned; False where it failed."""
    values = search.draw(trial)
    if WORKDIR not in trial.user_attrs:
        trial.set_user_attr(WORKDIR, f"{trial.number:04d}")
    workdir = _workdir(search, trial)
    try:
        search.config_of(values)
    except ValueError as error:
        # Not a failure: some values of a space may not fit together.
        logger.warning("trial %d: %s does not fit together: %s", trial.number, _shown(values), error)
        study.tell(trial, state=TrialState.PRUNED)
        return True
    logger.info("trial %d: %s", trial.number, _shown(values))
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOG_FILE).open("a", encoding="utf-8") as log:
        command = [*search.command(values, workdir), *shared]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            pruned = _follow(process, trial, workdir, f"validation/{metric}")
        finally:
            process.terminate()
            process.wait()
    found = [line[f"validation/{metric}"] for line in read_metrics(workdir) if f"validation/{metric}" in line]
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        logger.info("trial %d: stopped early, %s %.4f", trial.number, metric, max(found))
    elif process.returncode or not found:
        study.tell(trial, state=TrialState.FAIL)
        logger.warning(
            "trial %d failed with status %s: %s", trial.number, process.returncode, workdir / LOG_FILE
        )
        return False
    else:
        study.tell(trial, max(found))
        logger.info("trial %d: %s %.4f", trial.number, metric, max(found))
    _keep_best(search, study)
    return True


def _follow(process: subprocess.Popen[bytes], trial: Trial, workdir: Path, metric: str) -> bool:
    """Reports each validation to the study; True where the trial should end early."""
    reported: set[int] = set()
    running = True
    while running:
        running = process.poll() is None
        for line in read_metrics(workdir):
            step = int(line["step"])
            if metric in line and step not in reported:
                reported.add(step)
                trial.report(line[metric], step)
                if running and trial.should_prune():
                    return True
        if running:
            time.sleep(POLL_SECONDS)
    return False


def _keep_best(search: Search, study: Study) -> None:
    """Writes `best.json`, and removes the checkpoints of every trial but the best; curves and logs stay."""
    best = best_trial(study)
    if best is None:
        return
    values = {field: str(best.params[field]) for field in search.space}
    command = ["python", *search.command(values, Path("runs/best"))[1:]]
    body = {
        "trial": best.number,
        "value": best.value,
        "workdir": str(Path("trials") / best.user_attrs[WORKDIR]),
        "values": values,
        "command": shlex.join(command),
    }
    _write_json(search.workdir / BEST_FILE, body)
    for other in (search.workdir / "trials").iterdir():
        if other.name != best.user_attrs[WORKDIR]:
            for name in ("checkpoints", "best"):
                shutil.rmtree(other / name, ignore_errors=True)
