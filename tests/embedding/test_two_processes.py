"""Two processes of four devices each train the cases of `test_engine` to their dense one-device twin.

The exchange crosses from process to process here (gloo over the loopback). Run as a program, this file is one of them.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback

import pytest

PROCESSES, DEVICES, LIMIT_SECONDS = 2, 4, 240
MESH = (2, 4)  # `data` lies across the processes, `model` within them
SKEWS = ("uniform", "Zipf", "sorted by popularity", "one id")
# Optimizer and exchange -> the skews that one compiled step is run with; a program takes seconds, a run tenths.
PROGRAMS = {
    ("Sgd", "padded", 0): SKEWS,
    ("Sgd", "ragged", 5): SKEWS,
    ("RowAdagrad", "padded", 3): ("uniform", "one owner, apart"),
}
CASES = [(*program, skew) for program, skews in PROGRAMS.items() for skew in skews]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, repository):
    """What each process says of each case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": str(repository),
        "JAXREC_CPU_DEVICES": str(DEVICES),
        "JAXREC_COORDINATOR": f"127.0.0.1:{port}",
        "JAXREC_NUM_PROCESSES": str(PROCESSES),
    }
    logs = [tmp_path_factory.mktemp("processes") / f"{index}.log" for index in range(PROCESSES)]
    running = []
    for index, path in enumerate(logs):
        with path.open("w") as log:
            environment = shared | {"JAXREC_PROCESS_ID": str(index)}
            running.append(
                subprocess.Popen(
                    [sys.executable, __file__], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    until = time.monotonic() + LIMIT_SECONDS
    # Where one fails the other waits for it, so the first bad end is the end of both.
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        if any(process.poll() for process in running):
            break
        time.sleep(0.05)
    statuses = [process.poll() for process in running]
    for process in running:
        process.kill()
        process.wait()
    texts = [path.read_text() for path in logs]
    said = "\n".join(f"process {index}:\n{text[-6000:]}" for index, text in enumerate(texts))
    assert statuses == [0] * PROCESSES, f"statuses {statuses} (None = over {LIMIT_SECONDS} s)\n{said}"
    return [
        [json.loads(line) for line in text.splitlines() if line.startswith('{"devices"')] for text in texts
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
def test_two_processes_equal_the_dense_twin(answers, case):
    from_all = [answer[CASES.index(case)] for answer in answers]
    assert [answer["error"] for answer in from_all] == [""] * PROCESSES
    assert {answer["devices"] for answer in from_all} == {PROCESSES * DEVICES}
    (rounds,) = {answer["extra_rounds"] for answer in from_all}
    *_, capacity, skew = case
    if capacity and skew != "one id":  # which needs room for one
        assert rounds > 10, "a step with overflow needs more than one round"


def main() -> None:
    """One of the processes: a line of JSON a case."""
    # Only here: as a program, this file has its directory on the path, and no backend may start before its options.
    import jax
    import test_engine

    from jaxrec.core.mesh import initialize_platform, make_mesh
    from jaxrec.embedding import engine, row_optimizer

    initialize_platform()
    mesh = make_mesh(MESH)
    for name, transport, capacity, skew in CASES:
        optimizer = getattr(row_optimizer, name)(learning_rate=0.25)
        rounds, error = 0, ""
        with jax.set_mesh(mesh):
            try:
                exchange = engine.Exchange(transport=transport, capacity=capacity)
                rounds = test_engine.run(mesh, optimizer, skew, exchange)
            except AssertionError:
                error = traceback.format_exc()
        print(json.dumps({"devices": mesh.size, "extra_rounds": rounds, "error": error}), flush=True)


if __name__ == "__main__":
    main()
