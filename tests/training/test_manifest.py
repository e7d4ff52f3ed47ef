"""The manifest of a checkpoint: what it records, and what it notices."""

import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.training.manifest import MANIFEST, DamagedError, Manifest

contents = st.dictionaries(st.sampled_from(["a", "b/c", "b/d/e", "f"]), st.binary(max_size=40), min_size=1)
ARRAYS = {"x.y": np.zeros((2, 3), np.float32), "step": np.zeros((), np.int32)}


def written(directory, files, metadata=None) -> epath.Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Manifest.of_state(7, ARRAYS, metadata or {}).write(epath.Path(directory))
    return epath.Path(directory)


@given(files=contents)
def test_it_records_every_file(files, tmp_path_factory):
    directory = written(tmp_path_factory.mktemp("step"), files, {"metric": 0.5})
    manifest = Manifest.read(directory)
    assert manifest.step == 7
    assert manifest.arrays == {"x.y": ((2, 3), "float32"), "step": ((), "int32")}
    assert {name: size for name, (size, _) in manifest.files.items()} == {n: len(c) for n, c in files.items()}
    assert manifest.metadata == {"metric": 0.5}
    manifest.check_files(directory)


@given(files=contents, data=st.data())
def test_any_changed_byte_is_noticed(files, data, tmp_path_factory):
    directory = written(tmp_path_factory.mktemp("step"), files)
    manifest = Manifest.read(directory)
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name]) or bytearray(1)
    if files[name]:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (directory / name).write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=name):
        manifest.check_files(directory)


@given(data=st.data())
def test_a_manifest_notices_its_own_damage(data, tmp_path_factory):
    directory = written(tmp_path_factory.mktemp("step"), {"a": b"content"})
    text = bytearray((directory / MANIFEST).read_bytes())
    before = json.loads(text)
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    (directory / MANIFEST).write_bytes(bytes(text))
    try:
        after = Manifest.read(directory)
    except DamagedError:
        return
    # Only blanks may change without notice.
    assert after.step == before["step"]
    assert json.loads(bytes(text)) == before


def test_processes_share_the_reading(tmp_path):
    directory = written(tmp_path, {"a": b"1", "b": b"2", "c": b"3"})
    manifest = Manifest.read(directory)
    (directory / "b").write_bytes(b"x")
    manifest.check_files(directory, part=0, num_parts=2)
    with pytest.raises(DamagedError, match="b has"):
        manifest.check_files(directory, part=1, num_parts=2)


def test_a_missing_or_foreign_manifest(tmp_path):
    with pytest.raises(DamagedError, match="cannot be read"):
        Manifest.read(epath.Path(tmp_path))
    for text in ("", "[]", "3", "{}", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")):
        (tmp_path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DamagedError):
            Manifest.read(epath.Path(tmp_path))


def test_a_long_list_of_differences_is_cut(tmp_path):
    manifest = Manifest.of_state(1, {f"a{i}": ARRAYS["step"] for i in range(12)}, {})
    with pytest.raises(ValueError, match="another state: .*; and 4 more. Use the config that wrote it"):
        manifest.check_state({}, epath.Path(tmp_path), partial=False)
    manifest.check_state({}, epath.Path(tmp_path), partial=True)
