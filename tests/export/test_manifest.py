import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.export import manifest as module
from jaxrec.export.directory import TEMPORARY_PREFIX, new_version
from jaxrec.export.manifest import (
    CHECKSUM,
    MANIFEST,
    DamagedBundleError,
    FileEntry,
    Manifest,
    check_name,
    check_path,
    file_entries,
)

PROGRAM = {
    "inputs": [{"name": "item_ids", "dims": ["b", 3], "dtype": "int32"}],
    "outputs": [],
    "weights": ["w"],
}


def written(directory, **changes):
    """A bundle of two files."""
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "weights").write_bytes(bytes(range(256)))
    (directory / "card.md").write_text("text")
    fields = {"version": "v1", "facts": {"k": 3}, "programs": {"rank": PROGRAM}, "checks": []}
    manifest = Manifest(**(fields | {"files": file_entries(directory)} | changes))
    manifest.write(directory)
    return manifest


def body_of(directory):
    return json.loads((directory / MANIFEST).read_bytes())


def test_what_is_written_is_read(tmp_path):
    manifest = written(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    manifest.verify(tmp_path)
    assert manifest.files["card.md"].num_bytes == 4
    assert list(manifest.files) == ["card.md", "deep/weights"]


@pytest.mark.parametrize("path", ["card.md", "deep/weights", MANIFEST, CHECKSUM])
def test_any_flipped_byte_is_refused_with_the_files_name(tmp_path, path):
    written(tmp_path)
    whole = (tmp_path / path).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 20)):
        for bit in (1, 32):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            (tmp_path / path).write_bytes(damaged)
            with pytest.raises(DamagedBundleError, match=path):
                Manifest.read(tmp_path).verify(tmp_path)
    (tmp_path / path).write_bytes(whole)
    Manifest.read(tmp_path).verify(tmp_path)


def test_files_that_are_cut_missing_unlisted_or_links_are_refused(tmp_path):
    manifest = written(tmp_path / "b")
    (tmp_path / "b" / "card.md").write_text("tex")
    with pytest.raises(DamagedBundleError, match=r"card.md .* has 3 bytes instead of 4"):
        manifest.verify(tmp_path / "b")
    (tmp_path / "b" / "card.md").unlink()
    with pytest.raises(DamagedBundleError, match="card.md is missing"):
        manifest.verify(tmp_path / "b")
    (tmp_path / "outside").write_text("text")
    (tmp_path / "b" / "card.md").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedBundleError, match="is a link"):
        manifest.verify(tmp_path / "b")
    (tmp_path / "b" / "card.md").unlink()
    (tmp_path / "b" / "card.md").write_text("text")
    (tmp_path / "b" / "more.so").write_text("")
    with pytest.raises(DamagedBundleError, match="more.so in .* is not in the manifest"):
        manifest.verify(tmp_path / "b")


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(DamagedBundleError, match="holds no whole bundle"):
        Manifest.read(tmp_path)
    written(tmp_path / "b")
    (tmp_path / "b" / CHECKSUM).unlink()
    with pytest.raises(DamagedBundleError, match="holds no whole bundle"):
        Manifest.read(tmp_path / "b")


def test_sizes_are_bounded_before_anything_is_parsed(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(DamagedBundleError, match=r"manifest.json has more than 100 bytes"):
        Manifest.read(tmp_path)
    with pytest.raises(ValueError, match="readers take 100"):
        written(tmp_path / "b")


@pytest.mark.parametrize("number", [0, 2, True, "1", None])
def test_other_formats_are_refused(tmp_path, number):
    written(tmp_path)
    body = body_of(tmp_path) | {"format_version": number}
    with pytest.raises(ValueError, match=r"format_version=.*this program reads 1; export the run again"):
        Manifest.parse(json.dumps(body).encode())
    with pytest.raises(ValueError, match="this is no bundle"):
        Manifest.parse(json.dumps(body | {"format": "x"}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "../v1"),
        ("version", 3),
        ("facts", []),
        ("programs", {"a/b": PROGRAM}),
        ("programs", {"rank": {}}),
        ("programs", {"rank": PROGRAM | {"inputs": [{"name": "x", "dims": [1.5], "dtype": "int32"}]}}),
        ("checks", {}),
        ("files", {"a": {"bytes": -1, "sha256": "0" * 64}}),
        ("files", {"a": {"bytes": True, "sha256": "0" * 64}}),
        ("files", {"a": {"bytes": 1, "sha256": "0" * 63}}),
        ("files", {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"a/../../b": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {MANIFEST: {"bytes": 1, "sha256": "0" * 64}}),
    ],
)
def test_every_field_is_checked(tmp_path, field, value):
    written(tmp_path)
    with pytest.raises(ValueError, match=r"manifest|name|path"):
        Manifest.parse(json.dumps(body_of(tmp_path) | {field: value}).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_the_bytes_are_the_answer_is_a_manifest_or_a_value_error(text):
    with pytest.raises(ValueError):
        Manifest.parse(text)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("format", "format_version", "version", "facts", "programs", "checks", "files"), JSON
        ),
    )
)
def test_a_manifest_with_anything_in_its_fields_is_sound_or_a_value_error(changes):
    entry = {"bytes": 1, "sha256": "0" * 64}
    body = {"format": "jaxrec.bundle", "format_version": 1, "version": "v", "facts": {}, "programs": {}}
    body |= {"checks": [], "files": {"a/b": entry}} | changes
    try:
        manifest = Manifest.parse(json.dumps(body).encode())
    except ValueError:
        return
    assert all(check_path(path) == path for path in manifest.files)
    assert check_name(manifest.version) == manifest.version


def test_deep_json_is_refused():
    with pytest.raises(DamagedBundleError, match="no JSON"):
        Manifest.parse(b"[" * 200_000)


@given(st.text(max_size=30) | st.from_regex(r"(\.{0,2}[a-z/]{0,3}){0,5}", fullmatch=True))
def test_no_accepted_path_leaves_the_directory(path):
    try:
        check_path(path)
    except ValueError:
        return
    inside = os.path.normpath(os.path.join("/root/bundle", path))
    assert inside == f"/root/bundle/{path}"


def test_a_version_appears_whole(tmp_path):
    with new_version(tmp_path, "v1") as place:
        (place / "a").write_text("x")
        assert not (tmp_path / "v1").exists()
    assert (tmp_path / "v1" / "a").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]
    with (
        pytest.raises(ValueError, match=r"v1 is there already.*choose another --version"),
        new_version(tmp_path, "v1"),
    ):
        pass


def test_a_failed_version_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_version(tmp_path, "v1") as place:
        (place / "a").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_two_exports_of_a_version_do_not_mix(tmp_path):
    with (
        pytest.raises(ValueError, match="by another process meanwhile"),
        new_version(tmp_path, "v1") as place,
    ):
        (place / "a").write_text("slow")
        with new_version(tmp_path, "v1") as other:
            (other / "a").write_text("fast")
    assert (tmp_path / "v1" / "a").read_text() == "fast"
    assert not any(path.name.startswith(TEMPORARY_PREFIX) for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "x" * 129, "é"])
def test_names_of_versions_are_strict(tmp_path, name):
    with pytest.raises(ValueError, match="choose another one"), new_version(tmp_path, name):
        pass


def test_entries_are_sizes_and_checksums(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # Of "abc", from FIPS 180-2.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_entries(tmp_path) == {"a": FileEntry(3, known)}
