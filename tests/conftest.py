"""The ground every test stands on: eight virtual CPU devices, no network, no skips.

JAX reads its device count once, when the first backend starts, so the count is set here, before any test
module is imported, and asserted: on one device every sharding test would pass without testing anything.
"""

import atexit
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

# The environment is set before jax, tensorflow and transformers read it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: the emitters of fusions and LLVM's passes are not worth their wait here, and
# two workers have no cores for a kernel compiled in many parts. Benchmarks run what users run. XLA ends the process
# at a flag that it does not know, and from jaxlib 0.11 on there are only emitters.
_flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
# What one test compiled, no other test, worker or process that a test starts compiles again. Made by the first process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxrec-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("TFDS_RETRY_TRIES", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import coverage
import hypothesis
import jax
import jaxtyping
import pytest

NUM_DEVICES = 8
MESH_SHAPES = ((8, 1), (2, 4), (1, 8))
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Only here is a PyTorch without CUDA pinned (requirements/test-no-deps.txt); the committed golden vectors
# cover the same ground on every Python.
TORCH_TESTS = ["nn/test_huggingface_torch.py"]
HAS_PINNED_TORCH = sys.version_info < (3, 12)

collect_ignore = [] if HAS_PINNED_TORCH else TORCH_TESTS

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)

if os.environ.get("JAXREC_CHECK_SHAPES") == "1":
    # Tests have no packages, so the checker is put where the import hook looks for it by name.
    _spec = importlib.util.spec_from_file_location("shape_check", REPOSITORY / "tests" / "shape_check.py")
    sys.modules["shape_check"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["shape_check"])
    jaxtyping.install_import_hook("jaxrec", "shape_check.check_shapes")

# Derandomized: a red run is red again on the next machine. The deadline measures compilation, not the test.
hypothesis.settings.register_profile(
    "jaxrec",
    deadline=None,
    derandomize=True,
    max_examples=30,
    print_blob=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("jaxrec")

_skipped: list[str] = []


def shared_data_directory() -> pathlib.Path:
    """The directory of the larger public data sets: `JAXREC_DATA`, else `../shared/data`."""
    return pathlib.Path(os.environ.get("JAXREC_DATA") or REPOSITORY.parent / "shared" / "data")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Says aloud what this machine leaves out, since a silent gap looks like a pass."""
    shapes = (
        "checked" if os.environ.get("JAXREC_CHECK_SHAPES") == "1" else "not checked; JAXREC_CHECK_SHAPES=1"
    )
    lines = [f"devices: {NUM_DEVICES} virtual CPU devices, meshes {MESH_SHAPES}; declared shapes: {shapes}"]
    if not HAS_PINNED_TORCH:
        lines.append(f"not collected on Python {sys.version_info.minor}: {TORCH_TESTS} (golden vectors run)")
    if not shared_data_directory().is_dir():
        lines.append(
            f"deselected: tests marked shared_data ({shared_data_directory()} is absent; set JAXREC_DATA)"
        )
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests on the larger data sets where those are absent; the header says so."""
    if shared_data_directory().is_dir():
        return
    absent = [item for item in items if item.get_closest_marker("shared_data")]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if not item.get_closest_marker("shared_data")]


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    found = jax.device_count()
    assert found == NUM_DEVICES, f"{found} devices, not {NUM_DEVICES}: a backend started before conftest.py"


@pytest.fixture(params=MESH_SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def mesh(request):
    """Each mesh that the rules promise to be equal, as the current mesh."""
    from jaxrec.core.mesh import make_mesh

    mesh = make_mesh(request.param)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The directory of the larger data sets; for tests marked `shared_data`."""
    return shared_data_directory()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the checkout: where `configs/`, `launch/` and the entries are run."""
    return REPOSITORY


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:  # xfail counts too: a test that may fail tells nothing
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test fails the run: here every test runs, or is left out aloud in the header."""
    if _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    # A worker that takes more than ten seconds to end is killed, and what it covered would be lost.
    if (measured := coverage.Coverage.current()) is not None:
        measured.save()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.write_line(f"failed: {len(_skipped)} skipped tests, e.g. {_skipped[0]}", red=True)
