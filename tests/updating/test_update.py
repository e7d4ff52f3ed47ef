"""Updates: what they read, make, decide and keep, and that a kill at any step loses and repeats nothing."""

import dataclasses
import fcntl
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrec.config import read_run_config, write_run_config
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepared_fingerprint
from jaxrec.evaluation.significance import paired_comparison
from jaxrec.export.manifest import Manifest
from jaxrec.runs import load_state
from jaxrec.serving.version import Version
from jaxrec.train import train_run
from jaxrec.training.state import logical_rows
from jaxrec.updating import update
from jaxrec.updating.comparison import Verdict
from jaxrec.updating.history import HISTORY_FILE, read_outcomes
from jaxrec.updating.update import StoppedError, update_once


def verdict(difference):
    """Of a new model that is better, or worse, by so much for every user."""
    comparison = paired_comparison(np.full(30, 0.5), np.full(30, 0.5) + difference)
    return Verdict(metric="ndcg@10", targets=30, comparison=comparison, least=-0.01)


class Fakes:
    """Training, comparison and export that cost nothing; they note what they were asked."""

    def __init__(self, monkeypatch, version):
        self.difference, self.trained, self.exported, self._version = 0.1, [], [], version
        monkeypatch.setattr(update, "_compare", lambda *_: verdict(self.difference))
        monkeypatch.setattr(update, "export_run", self.export)

    def train(self, config, workdir):
        dataset = PreparedDataset.open(config.data.path)
        new = dataset.histories(np.arange(dataset.metadata.num_users))
        assert (new.timestamps >= config.data.train_since).any()
        write_run_config(workdir, config)
        self.trained.append((workdir.name, config))
        return True

    def export(self, workdir, out, options, **_):
        data = Path(read_run_config(workdir).data.path)
        self._version(out / options.version, prepared_fingerprint(data), f"2002-{len(self.exported):04d}")
        self.exported.append(options)


@pytest.fixture
def fakes(monkeypatch, version):
    return Fakes(monkeypatch, version)


def versions(options):
    return sorted(path.name for path in options.model.iterdir())


def logged(directory):
    """Numbers and users of the log that an update's data hold."""
    table = pq.read_table(directory / "log.parquet")
    return table["number"].to_pylist(), set(table["user_id"].to_pylist())


def test_a_real_update_from_log_to_version(options, store, append):
    append(0, 60)
    outcome = update_once(options, store, train_run)
    assert outcome.promoted and outcome.text.startswith("update 1: promoted as ")
    assert (outcome.new_events, outcome.held_out_events, outcome.last) == (42, 18, 60)
    assert (outcome.new_items, outcome.new_users, outcome.num_train_steps) == (1, 9, 2)
    assert outcome.targets > 0 and outcome.users > 0
    # What answers now knows the new item; histories are those before the log, which the server has itself.
    version = Version.open(options.model / outcome.version)
    assert version.bundle.catalogue.vocabulary.id_of(99) > 0
    assert "guest-1" not in version.known_users and len(version.history("7")) == 8
    assert_tells_of_the_test(version.bundle, outcome)
    # The rows of the run are where the update began; those of new items and users are its own.
    old, new = load_state(options.workdir), load_state(options.updates / outcome.run)
    keys = [run[1].item_keys.tolist() for run in (old, new)]
    assert set(keys[1]) - set(keys[0]) == {99}
    users = [list(map(str, run[1].user_keys)) for run in (old, new)]
    rows = []
    for _, _, setup, state in (old, new):
        with jax.set_mesh(setup.mesh):
            rows.append(np.asarray(logical_rows(setup.tables["user"], state.tables["user"])))
    quiet = "3"  # no event of this user is new, and none was replayed beyond two steps of small rates
    before, after = (rows[at][users[at].index(quiet) + 1] for at in (0, 1))
    np.testing.assert_allclose(before, after, atol=0.02)
    assert len(users[1]) == len(users[0]) + 9
    assert update_once(options, store, train_run) is None, "nothing is new"


def assert_tells_of_the_test(bundle, outcome):
    """Licence, metrics and card of a promoted version."""
    assert bundle.facts["data"]["licence"] == "The shop's, given by hand."
    update = json.loads(bundle.metrics)["update"]
    assert update["decision"] == outcome.text and update["interval"] == [outcome.low, outcome.high]
    assert (update["metric"], update["old"], update["new"]) == (outcome.metric, outcome.old, outcome.new)
    assert (update["num_users"], update["num_targets"]) == (outcome.users, outcome.targets)
    card = (bundle.directory / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Not stated" not in card and "Not evaluated" not in card
    assert "## Licence of the data\n\nThe shop's, given by hand.\n" in card
    interval = f"{outcome.low:+.4f} to {outcome.high:+.4f}"
    assert f"{outcome.old:.4f} | {outcome.new:.4f} | {outcome.difference:+.4f} | {interval} |" in card
    assert "95 % paired bootstrap" in card and f"The decision: {outcome.text}." in card


def test_a_version_of_before_licences_has_that_of_the_run(options, store, append, fakes):
    newest = Manifest.read(options.model / "v1")
    data = {"fingerprint": newest.facts["data"]["fingerprint"]}
    dataclasses.replace(newest, facts={**newest.facts, "data": data}).write(options.model / "v1")
    readme = Path(read_run_config(options.workdir).data.path) / "README.md"
    readme.write_text("Licence: that of the files", encoding="utf-8")
    append(0, 40)
    try:
        update_once(options, store, fakes.train)
    finally:
        readme.unlink()
    assert [like.data_licence for like in fakes.exported] == ["that of the files"]


def test_updates_go_on_from_each_other(options, store, append, fakes):
    append(0, 40)
    first = update_once(options, store, fakes.train)
    append(40, 9)
    assert update_once(options, store, fakes.train) is None, "nine are too few"
    append(49, 31)
    second = update_once(options, store, fakes.train)
    (_, one), (_, two) = fakes.trained
    assert one.init_from == str(options.workdir) and two.init_from == str(options.updates / "000001")
    assert one.data.train_since < two.data.train_since == first.trained_before
    assert first.trained_to < second.trained_to < second.last == 80
    assert second.new_events == second.trained_to - first.trained_to
    numbers, _ = logged(options.updates / "000002")
    assert numbers == list(range(1, 81))
    assert versions(options) == sorted(["v1", first.version, second.version])
    assert [like.histories for like in fakes.exported] == [True, False], "as the version before has them"
    assert read_outcomes(options.updates) == [first, second]


def test_old_versions_of_updates_go_where_that_is_asked_for(options, store, append, fakes):
    found = []
    for number in range(3):
        append(20 * number, 20)
        found.append(update_once(options, store, fakes.train).version)
    assert versions(options) == sorted(["v1", *found]), "all stay"
    (options.model / found[0]).rename(options.model / f".{found[0]}")  # a process that was killed over it
    append(60, 20)
    found.append(update_once(dataclasses.replace(options, keep_versions=2), store, fakes.train).version)
    assert versions(options) == sorted(["v1", *found[2:]]), "v1 is not an update's"


def test_a_worse_model_does_not_answer(options, store, append, fakes):
    append(0, 40)
    fakes.difference = -0.1
    kept = update_once(options, store, fakes.train)
    assert not kept.promoted and kept.version == "" and versions(options) == ["v1"]
    assert "the old model stays: ndcg@10 0.5000 -> 0.4000" in kept.text and "is below -0.0100" in kept.text
    assert update_once(options, store, fakes.train) is None, "the same events are not tried again"
    append(40, 20)
    fakes.difference = 0.0
    outcome = update_once(options, store, fakes.train)
    assert outcome.promoted and outcome.new_events + outcome.held_out_events == 60, "nothing was lost"
    assert [config.init_from for _, config in fakes.trained] == [str(options.workdir)] * 2
    assert sorted(path.name for path in options.updates.iterdir() if path.is_dir()) == ["000002"]


STEPS = ("write_snapshot", "prepare", "train", "_compare", "write_text", "export_run", "add_outcome", "_tidy")
CALLS = {"_tidy": 2}  # the first one is of what an earlier call has left


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_loses_and_repeats_nothing(
    step, after, options, store, append, fakes, monkeypatch
):
    append(0, 40)
    train = fakes.train

    calls = itertools.count(1)

    def dying(function):
        def run(*arguments, **keywords):
            dies = next(calls) == CALLS.get(step, 1)
            if after or not dies:
                function(*arguments, **keywords)
            if dies:
                raise KeyboardInterrupt

        return run

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if step == "train":
            train = dying(train)
        else:
            patch.setattr(update, step, dying(getattr(update, step)))
        update_once(options, store, train)
    append(40, 5)  # the world goes on meanwhile
    ended = step == "_tidy" or (step == "add_outcome" and after)
    assert (update_once(options, store, fakes.train) is None) == ended
    (only,) = read_outcomes(options.updates)
    assert only.promoted and versions(options) == sorted(["v1", only.version])
    late = step == "write_snapshot" and not after
    numbers, _ = logged(options.updates / "000001")
    assert numbers == list(range(1, 46 if late else 41)) and only.last == numbers[-1]
    append(45, 15)
    second = update_once(options, store, fakes.train)
    assert second.new_events + second.held_out_events + only.new_events == 60


def test_erased_users_are_not_trained_on(options, store, append, fakes, monkeypatch):
    append(0, 40)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def kill(*_):
            raise KeyboardInterrupt

        patch.setattr(update, "_compare", kill)
        update_once(options, store, fakes.train)
    assert "guest-3" in logged(options.updates / "000001")[1]
    assert store.erase("guest-3") == 4
    first = update_once(options, store, fakes.train)
    assert "guest-3" not in logged(options.updates / "000001")[1], "the update began anew"
    assert first.new_events + first.held_out_events == 36
    store.erase("guest-4")
    append(40, 20)
    update_once(options, store, fakes.train)
    numbers, users = logged(options.updates / "000002")
    assert "guest-4" in users, "by what came after"
    assert [n for n in numbers if n <= 40 and (n - 1) % 10 == 4] == []
    dataset = PreparedDataset.open(fakes.trained[-1][1].data.path)
    assert "guest-3" in dataset.user_keys.tolist(), "by what came after, too"


def test_a_stopped_training_goes_on(options, store, append, fakes):
    append(0, 40)
    with pytest.raises(StoppedError, match="000001 was stopped while it trained"):
        update_once(options, store, lambda config, workdir: fakes.train(config, workdir) and False)
    other = dataclasses.replace(options, overrides=("--config.num_train_steps=7",))
    outcome = update_once(other, store, fakes.train)
    assert outcome.num_train_steps == 2, "as it had begun"
    assert fakes.trained[0][1] == dataclasses.replace(
        fakes.trained[1][1], init_from=fakes.trained[0][1].init_from
    )


def test_events_that_the_run_has_are_left_out(options, store, append, fakes):
    append(0, 40)
    outcome = update_once(dataclasses.replace(options, after=25), store, fakes.train)
    assert outcome.new_events + outcome.held_out_events == 15


def test_what_is_wrong_is_said(options, store, append, fakes, version):
    append(0, 40)
    with pytest.raises(ValueError, match=r"elsewhere holds no run"):
        update_once(
            dataclasses.replace(options, workdir=options.workdir.parent / "elsewhere"), store, fakes.train
        )
    with pytest.raises(ValueError, match="holds no exported version"):
        update_once(dataclasses.replace(options, model=options.workdir), store, fakes.train)
    with (
        (options.updates / "lock").open("w") as other,
        pytest.raises(BlockingIOError, match="in use by another update"),
    ):
        fcntl.flock(other, fcntl.LOCK_EX)
        update_once(options, store, fakes.train)
    with pytest.raises(ValueError, match=r"v1 is a version, and a new one would lie beside it"):
        update_once(dataclasses.replace(options, model=options.model / "v1"), store, fakes.train)
    version(options.model / "v2", "another", "2003")
    small = Manifest.read(options.model / "v2")
    dataclasses.replace(small, facts={**small.facts, "compression": "int8"}).write(options.model / "v2")
    with pytest.raises(
        ValueError, match=r"v2 was compressed by int8, and an update exports what it has trained"
    ):
        update_once(options, store, fakes.train)
    small.write(options.model / "v2")
    with pytest.raises(ValueError, match=r"v2 was trained on the data another, and .*run, which"):
        update_once(options, store, fakes.train)
    (options.updates / HISTORY_FILE).write_text("{}\n")
    with pytest.raises(ValueError, match="history.jsonl is damaged"):
        update_once(options, store, fakes.train)


def test_a_handful_of_users_decides_nothing():
    few = dataclasses.replace(verdict(0.1), least_users=31)
    assert verdict(0.1).not_worse and not few.not_worse
    assert "of 30 users, of the 31 users that are asked for; difference" in str(few)


def test_nothing_to_compare_on_is_not_better():
    none = Verdict(metric="ndcg@10", targets=0, comparison=None, least=0.0)
    assert not none.not_worse and str(none) == "no held-out event has a past to predict it from"
