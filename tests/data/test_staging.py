"""All or nothing: a directory appears whole, or not at all; what killed runs left is cleared."""

import errno
import os
import socket

import pytest

from jaxrec.data.staging import staged_directory

DEAD = 2**22 + 1  # above the largest process id that Linux gives


def test_a_directory_appears_whole_and_replaces_the_former(tmp_path):
    for content in ("one", "two"):
        with staged_directory(tmp_path / "a" / "out") as staging:
            (staging / "file").write_text(content)
            assert staging.parent == tmp_path / "a"
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
        assert (tmp_path / "a" / "out" / "file").read_text() == content


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), ValueError("bad")])
def test_a_failure_leaves_nothing_and_passes_on(tmp_path, error):
    with pytest.raises(type(error)), staged_directory(tmp_path / "out") as staging:
        (staging / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        OSError(errno.EFBIG, "x"),
        RuntimeError("writer: No space left on device"),
    ],
)
def test_a_full_disk_is_named_however_it_is_told(tmp_path, error):
    with pytest.raises(OSError, match="no space left while writing .*Free some space") as caught:
        with staged_directory(tmp_path / "out"):
            raise error
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_cleared_and_others_stay(tmp_path):
    host = socket.gethostname()
    names = [
        f".out.partial-{host}-{DEAD}",
        f".out.partial-elsewhere-{DEAD}",
        f".out.partial-{host}-1",
        ".out.old-x",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "out"])


def test_a_run_killed_between_the_renames_gives_the_former_dataset_back(tmp_path):
    (tmp_path / f".out.old-{socket.gethostname()}-{DEAD}").mkdir()
    (tmp_path / f".out.old-{socket.gethostname()}-{DEAD}" / "file").write_text("former")
    with pytest.raises(RuntimeError, match="stop"), staged_directory(tmp_path / "out"):
        assert (tmp_path / "out" / "file").read_text() == "former"
        raise RuntimeError("stop")
    assert (tmp_path / "out" / "file").read_text() == "former"
    assert os.listdir(tmp_path) == ["out"]
