"""Metric files and the progress of a run."""

import io
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxrec.training.writer import MetricWriter, TrainingProgress, read_metrics


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensorboard_events(path):
    """The records of one event file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def points(events):
    return [(event.step, value.simple_value) for event in events for value in event.summary.value]


def test_a_line_a_step_from_any_kind_of_scalar(tmp_path):
    loss, small = jnp.float32(2.5), jnp.ones((), jnp.bfloat16)
    with MetricWriter(tmp_path / "run") as writer, jax.transfer_guard("disallow"):
        writer.log(1, {"loss": loss, "events": 7, "rate": np.float32(0.5)})
        writer.log(2, {"loss": small})
    assert lines_of(tmp_path / "run") == [
        {"step": 1, "loss": 2.5, "events": 7.0, "rate": 0.5},
        {"step": 2, "loss": 1.0},
    ]


def test_lines_are_on_disk_before_the_writer_closes(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.log(1, {"loss": 1.0})
    assert lines_of(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()
    writer.close()


def test_a_resumed_run_does_not_double_its_curves(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    with MetricWriter(tmp_path, resume_step=4) as writer:
        writer.log(5, {"loss": 50.0})
        writer.log(6, {"loss": 60.0})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))
    first, second = (list(tensorboard_events(path)) for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert points(first) == [(step, float(step)) for step in range(1, 8)]
    assert points(second) == [(5, 50.0), (6, 60.0)]
    restarts = [event.step for event in second if event.session_log.status == SessionLog.START]
    assert restarts == [5], "TensorBoard drops the points from there on"


def test_a_run_from_the_start_forgets_the_one_before(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.log(3, {"loss": 1.0})
    with MetricWriter(tmp_path):
        pass
    assert lines_of(tmp_path) == []


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)


def refuse(constant):
    raise AssertionError(constant)


def test_reading_back(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3,')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\nnoise\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"line 2: 'noise' is not a line of metrics"):
        read_metrics(tmp_path)


def test_what_is_not_a_scalar_is_named(tmp_path):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"metric 'loss' has shape \(3,\).*reduce it first"):
            writer.log(1, {"loss": np.ones(3)})
        with pytest.raises(ValueError, match="a metric is called 'step'"):
            writer.log(1, {"step": 3})


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path / "run") as writer:
        writer.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    stream = io.StringIO()
    with TrainingProgress(10, stream=stream) as progress:
        progress.update(1, loss=1.0, events_per_second=1.0)
    assert stream.getvalue() == ""


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with TrainingProgress(120, start_step=20, stream=stream) as progress:
        progress.update(20, loss=3.0, events_per_second=0)
        progress.update(30, loss=jnp.float32(2.5), events_per_second=12345.6)
    assert stream.getvalue().splitlines() == [
        "step 20/120  loss 3.0000  0 events/s  ? left",
        "step 30/120  loss 2.5000  12,346 events/s  0:01:30 left",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with TrainingProgress(4, stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, loss=1.5, events_per_second=1000.0)
    assert "4/4" in stream.getvalue()
    assert "loss 1.5000  1,000 events/s" in stream.getvalue()
