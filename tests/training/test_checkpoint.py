"""Checkpoints: asynchronous, onto any mesh, whole or not at all."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrec.training.checkpoint import Checkpoints, DamagedCheckpointError, abstract_like

Slots = namedtuple("Slots", ["count", "moment"])

ROOT = Path(__file__).resolve().parents[2]


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: jax.Array
    tables: dict
    slots: Slots


def mesh_of(shape):
    assert jax.device_count() == 8, "a skip here would hide every sharding bug"
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def make_state(step: int, mesh=None) -> State:
    mesh = mesh or mesh_of((8, 1))
    rows = NamedSharding(mesh, PartitionSpec(("data", "model"), None))
    everywhere = NamedSharding(mesh, PartitionSpec())
    table = np.random.default_rng(step).normal(size=(64, 24)).astype(np.float32)
    return State(
        step=jax.device_put(jnp.int32(step), everywhere),
        tables={"item": jax.device_put(table, rows)},
        slots=Slots(
            jax.device_put(jnp.int32(2 * step), everywhere),
            [jax.device_put(jnp.full((5,), step, jnp.bfloat16), everywhere), None],
        ),
    )


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def open_checkpoints(directory, keep=2, save_every_steps=1):
    return Checkpoints(str(directory), keep=keep, save_every_steps=save_every_steps)


def write_steps(directory, *steps, keep=5):
    with open_checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step))


def restore(directory, template=None):
    with open_checkpoints(directory) as checkpoints:
        return checkpoints.restore_latest(template or abstract_like(make_state(0)))


def largest_file(step_directory: Path) -> Path:
    files = [path for path in step_directory.rglob("*") if path.is_file() and path.parent.name == "d"]
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def tree_of_files(directory: Path) -> dict:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path):
    assert restore(tmp_path) is None
    assert restore(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists(), "a reader writes nothing"


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_a_state_comes_back_bit_equal_on_any_mesh(tmp_path, shape):
    write_steps(tmp_path, 3)
    template = abstract_like(make_state(0, mesh_of(shape)))
    step, state = restore(tmp_path, template)
    assert step == 3
    assert_equal(state, make_state(3))
    for wanted, leaf in zip(jax.tree.leaves(template), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_it_keeps_the_newest_steps_and_saves_at_the_interval(tmp_path):
    with open_checkpoints(tmp_path, keep=2, save_every_steps=10) as checkpoints:
        saved = [step for step in range(1, 41) if checkpoints.save(step, make_state(step))]
        assert saved == [10, 20, 30, 40]
        assert checkpoints.save(41, make_state(41), force=True)
        assert not checkpoints.save(41, make_state(41), force=True), "it is there already"
        checkpoints.wait()
        assert checkpoints.latest_step() == 41
    assert sorted(path.name for path in tmp_path.iterdir()) == ["40", "41"]


def test_donating_the_state_right_after_a_save_is_safe(tmp_path):
    sharding = NamedSharding(mesh_of((8, 1)), PartitionSpec("data"))
    state = jax.device_put(jnp.arange(4_000_000, dtype=jnp.float32), sharding)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with open_checkpoints(tmp_path) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.save(1, {"x": state})
        state = overwrite(state)
        jax.block_until_ready(state)
        _, restored = checkpoints.restore_latest(abstract_like({"x": state}))
    np.testing.assert_array_equal(np.asarray(restored["x"]), np.arange(4_000_000, dtype=np.float32))


def test_metadata_lies_beside_the_arrays(tmp_path):
    with open_checkpoints(tmp_path, keep=1) as best:
        assert best.latest_metadata() is None
        best.save(1, make_state(1), metadata={"metric": 0.25})
        best.save(2, make_state(2), metadata={"metric": 0.5})
    with open_checkpoints(tmp_path, keep=1) as best:
        assert best.latest_metadata() == {"metric": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_two_directories_save_at_the_same_time(tmp_path):
    with open_checkpoints(tmp_path / "all") as newest, open_checkpoints(tmp_path / "best", keep=1) as best:
        newest.save(1, make_state(1))
        best.save(1, make_state(1))
        newest.save(2, make_state(2))
    assert restore(tmp_path / "all")[0] == 2
    assert restore(tmp_path / "best")[0] == 1


def damage_flip(step: Path):
    flip_a_bit(largest_file(step))


def damage_truncate(step: Path):
    path = largest_file(step)
    os.truncate(path, path.stat().st_size // 2)


def damage_delete(step: Path):
    largest_file(step).unlink()


def damage_manifest(step: Path):
    path = step / "manifest.json"
    path.write_text(path.read_text().replace('"int32"', '"int16"', 1))


def damage_manifest_syntax(step: Path):
    (step / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [damage_flip, damage_truncate, damage_delete, damage_manifest, damage_manifest_syntax]
)
def test_a_damaged_step_is_reported_and_the_one_before_taken(tmp_path, caplog, damage):
    write_steps(tmp_path, 1, 2)
    damage(tmp_path / "2")
    before = tree_of_files(tmp_path)
    with caplog.at_level(logging.WARNING):
        step, state = restore(tmp_path)
    assert step == 1
    assert_equal(state, make_state(1))
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    assert tree_of_files(tmp_path) == before, "a reader changes nothing"


def test_every_checked_file_is_protected(tmp_path):
    write_steps(tmp_path, 1)
    names = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    assert len(names) >= 5
    for name in names:
        path = tmp_path / "1" / name
        whole = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(DamagedCheckpointError, match=r"steps \[1\]"):
            restore(tmp_path)
        path.write_bytes(whole)
    assert restore(tmp_path)[0] == 1


def test_all_damaged_is_an_error(tmp_path):
    write_steps(tmp_path, 1, 2)
    damage_flip(tmp_path / "1")
    damage_truncate(tmp_path / "2")
    with pytest.raises(DamagedCheckpointError, match=r"steps \[1, 2\].*empty workdir"):
        restore(tmp_path)


def test_training_goes_on_over_a_damaged_step(tmp_path):
    write_steps(tmp_path, 1, 2, 5)
    damage_flip(tmp_path / "5")
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        step, _ = checkpoints.restore_latest(abstract_like(make_state(0)))
        assert step == 2
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        # The damaged one does not count as kept.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "5"]
        checkpoints.save(5, make_state(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]
    step, state = restore(tmp_path)
    assert step == 5
    assert_equal(state, make_state(5))


def test_junk_is_ignored_and_left_alone(tmp_path):
    (tmp_path / "8").mkdir()
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "notes.txt").write_text("mine")
    (tmp_path / "07").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "12").write_text("a file")
    (tmp_path / "²").mkdir()
    assert restore(tmp_path) is None
    write_steps(tmp_path, 3, 4)
    assert restore(tmp_path)[0] == 4
    write_steps(tmp_path, 8, 9, keep=1)
    assert restore(tmp_path)[0] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["07", "12", "9", "notes", "²"]


def test_a_run_that_was_not_restored_is_not_overwritten(tmp_path):
    write_steps(tmp_path, 6)
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="cannot save step 4.*already holds step 6.*another directory"):
            checkpoints.save(4, make_state(4))


def test_a_run_that_went_back_takes_the_place_of_its_future(tmp_path):
    # The best state may be newer than the newest checkpoint that a killed run resumes from.
    write_steps(tmp_path, 4, 6)
    with open_checkpoints(tmp_path, keep=2) as best:
        assert best.latest_metadata() == {}
        assert best.save(5, make_state(5), metadata={"metric": 1.0})
        best.wait()
        assert best.latest_metadata() == {"metric": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_metadata_are_plain_values(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="metadata of step 1 must be plain JSON values"):
            checkpoints.save(1, make_state(1), metadata={"metric": np.float32(1)})


def with_table(shape, dtype=jnp.float32):
    state = make_state(1)
    state.tables["item"] = jax.device_put(jnp.zeros(shape, dtype), state.step.sharding)
    return state


def test_another_state_is_an_error_that_names_the_path(tmp_path):
    write_steps(tmp_path, 1, 2)
    with pytest.raises(
        ValueError, match=r"'tables.item' is float32\[64, 24\] in the checkpoint and float32\[9, 24\]"
    ):
        restore(tmp_path, abstract_like(with_table((9, 24))))
    with pytest.raises(ValueError, match=r"bfloat16\[64, 24\] in this run"):
        restore(tmp_path, abstract_like(with_table((64, 24), jnp.bfloat16)))
    extra = make_state(1)
    extra.tables["user"] = extra.step
    with pytest.raises(
        ValueError, match="'tables.user' is not in the checkpoint.*Use the config that wrote it"
    ):
        restore(tmp_path, abstract_like(extra))
    less = make_state(1)
    less.tables.clear()
    with pytest.raises(ValueError, match="'tables.item' is only in the checkpoint"):
        restore(tmp_path, abstract_like(less))


def test_a_partial_restore_reads_only_what_is_asked(tmp_path):
    write_steps(tmp_path, 2)
    wanted = {"tables": abstract_like(make_state(0).tables)}
    with open_checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore_latest(wanted, partial=True)
    assert step == 2
    assert_equal(restored, {"tables": make_state(2).tables})


def test_leaves_that_a_checkpoint_cannot_hold(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="'a.b' is a int.*jnp.asarray"):
            checkpoints.save(1, {"a": {"b": 3}})
        with pytest.raises(ValueError, match="two arrays of the state have the path 'a.b'"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
        with pytest.raises(ValueError, match="'key' is a typed key"):
            checkpoints.save(1, {"key": jax.random.key(0)})
        with pytest.raises(ValueError, match="has no sharding"):
            checkpoints.save(1, {"x": jnp.ones(3)})
            checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})


@pytest.mark.parametrize(
    "arguments", [{"keep": 0, "save_every_steps": 1}, {"keep": 1, "save_every_steps": 0}]
)
def test_intervals_are_positive(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpoints(str(tmp_path), **arguments)


def test_sigterm_asks_for_one_more_checkpoint(tmp_path):
    earlier = []
    before = signal.signal(signal.SIGTERM, lambda *_: earlier.append(1))
    try:
        with open_checkpoints(tmp_path) as checkpoints:
            assert not checkpoints.reached_preemption(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert checkpoints.reached_preemption(2)
            assert checkpoints.save(2, make_state(2), force=True)
        assert earlier == [1], "the handler that was there hears of it too"
        assert restore(tmp_path)[0] == 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert earlier == [1, 1], "the handler is put back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_error_of_the_run_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="the run's own"):
        with open_checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(1))
            monkeypatch.setattr(checkpoints, "wait", failing_wait)
            raise RuntimeError("the run's own")


def failing_wait():
    raise OSError("no space")


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


FULL_DISK = """
import resource, sys
import jax.numpy as jnp, jax
from jaxrec.training.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=3, save_every_steps=1) as checkpoints:
    checkpoints.save(1, {"x": jnp.arange(100)})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    big = jax.random.normal(jax.random.key(0), (1_000_000,))
    try:
        checkpoints.save(2, {"x": big})
        checkpoints.wait()
    except OSError as error:
        print("MESSAGE", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    print("LATEST", checkpoints.latest_step())
    checkpoints.save(3, {"x": jnp.arange(100)})
"""


def test_a_disk_that_refuses_the_bytes_keeps_the_earlier_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "step 2 could not be saved" in done.stdout
    assert "the earlier checkpoints are untouched" in done.stdout
    assert "LATEST 1" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"], "the half-written step is gone"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        checkpoints.save(2, make_state(2))
        checkpoints._writer.wait_until_finished()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._writer, "wait_until_finished", no_space)
            with pytest.raises(OSError, match="The disk is full: free some space or lower keep_checkpoints"):
                checkpoints.wait()


def no_space():
    raise ValueError("Error writing local file: [OS error 28: ENOSPC No space left on device]")


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with open_checkpoints(tmp_path / "file" / "checkpoints") as checkpoints:
        with pytest.raises(
            OSError, match="step 1 could not be saved.*Check that the directory can be written"
        ):
            checkpoints.save(1, make_state(1))


# One process imports JAX once and forks a training run for each kill: no backend has started before a fork.
KILLED = """
import os, signal, sys, time, warnings
import jax, jax.numpy as jnp
from jaxrec.training.checkpoint import Checkpoints
warnings.simplefilter("ignore")
directory = sys.argv[1]
def newest():
    names = os.listdir(directory)
    return max([int(name) for name in names if name.isdigit()], default=0)
def train():
    jax.config.update("jax_num_cpu_devices", 2)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
    noise = jax.random.normal(jax.random.key(0), (1_000_000,))
    with Checkpoints(directory, keep=2, save_every_steps=1) as checkpoints:
        for step in range((checkpoints.latest_step() or 0) + 1, 10_000):
            checkpoints.save(step, {"step": jnp.int32(step), "x": jax.device_put(noise + step, sharding)})
for line in sys.stdin:
    before = newest()
    child = os.fork()
    if child == 0:
        train()
        os._exit(1)
    while newest() == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run died by itself"
        time.sleep(0.005)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(sorted(os.listdir(directory)), flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_state_to_resume_from(tmp_path):
    generator = random.Random(0)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rows = NamedSharding(mesh_of((8, 1)), PartitionSpec("data"))
    template = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=one_device),
        "x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=rows),
    }
    noise = np.asarray(jax.random.normal(jax.random.key(0), (1_000_000,)))
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True, bufsize=1,
    )  # fmt: skip
    last, interrupted = 0, 0
    with killer:
        for _ in range(5):
            killer.stdin.write(f"{generator.uniform(0, 0.3)}\n")
            names = killer.stdout.readline()
            assert names, "the killer died"
            interrupted += "orbax-checkpoint-tmp" in names
            with open_checkpoints(tmp_path) as checkpoints:
                step, state = checkpoints.restore_latest(template)
            assert step > last
            assert int(state["step"]) == step
            np.testing.assert_array_equal(np.asarray(state["x"]), noise + np.float32(step))
            last = step
        killer.stdin.close()
    assert interrupted, "some kills hit a save"


TWO_PROCESSES = """
import os, signal, sys, time
import jax
mode, process, port, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, num_processes=2, process_id=process)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxrec.training.checkpoint import Checkpoints, abstract_like
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, PartitionSpec(("data", "model"), None))
everywhere = NamedSharding(mesh, PartitionSpec())
def say(line):
    os.write(1, ("\\n" + line + "\\n").encode())  # at once: the transport's threads print, too
def make(step):
    return jax.jit(
        lambda: {"step": jnp.int32(step), "x": jnp.arange(64 * 8, dtype=jnp.float32).reshape(64, 8) + step},
        out_shardings={"step": everywhere, "x": rows})()
with jax.set_mesh(mesh), Checkpoints(directory, keep=2, save_every_steps=2) as checkpoints, \\
        Checkpoints(directory + "/best", keep=1, save_every_steps=1) as best:
    found = checkpoints.restore_latest(abstract_like(make(0)))
    start = 0 if found is None else found[0]
    if found is not None:
        local = found[1]["x"].addressable_shards[0]
        expected = (np.arange(64 * 8, dtype=np.float32).reshape(64, 8) + start)[local.index]
        np.testing.assert_array_equal(np.asarray(local.data), expected)
    say(f"START {start}")
    for step in range(start + 1, start + 400):
        state = make(step)
        checkpoints.save(step, state)
        if step % 3 == 0:
            best.save(step, state, metadata={"metric": step})
        if mode == "stop" and step == start + 6:
            break
        if mode == "preempt" and process == 1 and step == start + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if checkpoints.reached_preemption(step):
            checkpoints.save(step, state, force=True)
            break
        time.sleep(0.05 if mode == "preempt" else 0)
    checkpoints.wait()
    say(f"STEP {step} LATEST {checkpoints.latest_step()} BEST {best.latest_metadata()['metric']}")
jax.distributed.shutdown()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_two(mode: str, directory: Path) -> list[str]:
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, mode, str(process), port, str(directory)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )
        for process in range(2)
    ]  # fmt: skip
    outputs = []
    for child in children:
        out, error = child.communicate(timeout=300)
        assert child.returncode == 0, error[-3000:]
        outputs.append([line for line in out.splitlines() if line.startswith(("START", "STEP"))])
    assert outputs[0] == outputs[1], "the processes agree"
    return outputs[0]


def test_two_processes_save_fall_back_resume_and_leave_together(tmp_path):
    assert run_two("stop", tmp_path) == ["START 0", "STEP 6 LATEST 6 BEST 6"]
    damage_flip(tmp_path / "6")
    start, last = run_two("preempt", tmp_path)
    assert start == "START 4"
    _, step, _, latest, _, _ = last.split()
    assert step == latest and int(step) >= 9, "SIGTERM to one of them: both saved the same step"
    template = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh_of((1, 8)), PartitionSpec())),
        "x": jax.ShapeDtypeStruct(
            (64, 8), jnp.float32, sharding=NamedSharding(mesh_of((8, 1)), PartitionSpec("data"))
        ),
    }
    restored_step, state = restore(tmp_path, template)
    assert restored_step == int(step)
    np.testing.assert_array_equal(
        np.asarray(state["x"]), np.arange(512, dtype=np.float32).reshape(64, 8) + restored_step
    )
