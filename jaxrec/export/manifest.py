"""The manifest of a bundle: what it holds, and the size and SHA-256 of every file.

It is a JSON file, and beside it lies its own SHA-256 in the form of `sha256sum`. Whatever reads a bundle may have got
it from anywhere: sizes are bounded before anything is read, names are strict, and no name leads out of the directory.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

FORMAT, FORMAT_VERSION = "jaxrec.bundle", 1
MANIFEST, CHECKSUM = "manifest.json", "manifest.json.sha256"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES, MAX_DEPTH = 10_000, 6
CHUNK_BYTES = 1 << 22

LONGEST_NAME = 128  # of a version, and so of what requests say of one

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{LONGEST_NAME - 1}}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedBundleError(ValueError):
    """The files are not those that were exported; the message names the file."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size and checksum of a file."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
      version: the name of its directory.
      facts: of the run and the model, as JSON values (`exporter`).
      programs: of each program its inputs, outputs (name, dims, dtype) and weights (names), as JSON values.
      checks: of each artifact and program what the comparison with JAX found, as JSON values.
      files: by path in the directory, parts separated by "/".
    """

    version: str
    facts: Mapping[str, Any]
    programs: Mapping[str, Any]
    checks: Sequence[Mapping[str, Any]]
    files: Mapping[str, FileEntry]

    def write(self, directory: Path) -> None:
        """Writes it and its checksum into the directory."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "facts": self.facts,
            "programs": self.programs,
            "checks": self.checks,
            "files": {
                path: {"bytes": entry.num_bytes, "sha256": entry.sha256} for path, entry in self.files.items()
            },
        }
        text = (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()
        if len(text) > MAX_MANIFEST_BYTES:
            raise ValueError(f"the manifest has {len(text)} bytes, and readers take {MAX_MANIFEST_BYTES}.")
        (directory / MANIFEST).write_bytes(text)
        (directory / CHECKSUM).write_bytes(_checksum_line(text))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of a directory, checked against its checksum.

        Raises:
          DamagedBundleError: it is missing, too large or not what was written.
          ValueError: its format is not one that this program reads.
        """
        try:
            text = _bounded(directory / MANIFEST, MAX_MANIFEST_BYTES)
            line = _bounded(directory / CHECKSUM, 256)
        except OSError as error:
            raise DamagedBundleError(
                f"{directory} holds no whole bundle: {error}; export it again."
            ) from error
        if line != _checksum_line(text):
            raise DamagedBundleError(f"{MANIFEST} does not match {CHECKSUM} in {directory}; export it again.")
        return cls.parse(text)

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """The manifest of these bytes, whoever wrote them.

        Raises:
          DamagedBundleError: they are no manifest.
          ValueError: the format is not one that this program reads.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedBundleError(f"{MANIFEST} is no JSON: {error}.") from error
        body = _checked(body, dict, "the manifest")
        if body.get("format") != FORMAT:
            raise ValueError(
                f"{MANIFEST}: format={body.get('format')!r} is not {FORMAT!r}; this is no bundle."
            )
        if type(number := body.get("format_version")) is not int or number != FORMAT_VERSION:
            raise ValueError(
                f"{MANIFEST}: format_version={number!r}, and this program reads {FORMAT_VERSION}; export the run "
                "again, or use the jaxrec that wrote it."
            )
        files = _checked(body.get("files"), dict, "files")
        if len(files) > MAX_FILES:
            raise DamagedBundleError(f"{MANIFEST} names {len(files)} files, and {MAX_FILES} is the most.")
        return cls(
            version=check_name(_checked(body.get("version"), str, "version")),
            facts=_checked(body.get("facts"), dict, "facts"),
            programs={
                check_name(name): _program(program, name)
                for name, program in _checked(body.get("programs"), dict, "programs").items()
            },
            checks=_checked(body.get("checks"), list, "checks"),
            files={check_path(path): _entry(entry, path) for path, entry in files.items()},
        )

    def verify(self, directory: Path) -> None:
        """Compares every file with its entry.

        Raises:
          DamagedBundleError: one is missing, is not listed, or differs in size or checksum; names it.
        """
        found = set(listed_files(directory))
        if missing := sorted(set(self.files) - found):
            raise DamagedBundleError(f"{missing[0]} is missing in {directory}; export it again.")
        if unknown := sorted(found - set(self.files)):
            raise DamagedBundleError(f"{unknown[0]} in {directory} is not in the manifest; remove it.")
        for path, entry in self.files.items():
            num_bytes = (directory / path).stat().st_size
            if num_bytes != entry.num_bytes:
                raise DamagedBundleError(
                    f"{path} in {directory} has {num_bytes} bytes instead of {entry.num_bytes}; export it again."
                )
            if sha256_of(directory / path) != entry.sha256:
                raise DamagedBundleError(
                    f"{path} in {directory} does not match its SHA-256; export it again, or copy it anew."
                )


def check_name(name: str) -> str:
    """The name of a version or of a part of a path.

    Raises:
      ValueError: it holds anything but letters, digits, "_", "-" and ".", begins with "-" or ".", or is too long.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name {name[:200]!r} must begin with a letter, a digit or _ and hold nothing but these, - and ., at "
            f"most {LONGEST_NAME} in all; choose another one."
        )
    return name


def check_path(path: str) -> str:
    """A path inside of a bundle.

    Raises:
      ValueError: a part is no name, there are too many, or it is the manifest's own.
    """
    parts = path.split("/")
    if len(parts) > MAX_DEPTH or path in (MANIFEST, CHECKSUM):
        raise ValueError(f"the path {path[:200]!r} is not one of a bundle's files.")
    for part in parts:
        check_name(part)
    return path


def listed_files(directory: Path) -> list[str]:
    """The files of a directory that a manifest lists, by path.

    Raises:
      DamagedBundleError: something is neither a file nor a directory, such as a link.
    """
    names = []
    for root, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise DamagedBundleError(f"{path} is a link or no file; a bundle holds plain files only.")
        names += [Path(root, name).relative_to(directory).as_posix() for name in files]
    return sorted(name for name in names if name not in (MANIFEST, CHECKSUM))


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file."""
    return {
        check_path(path): FileEntry((directory / path).stat().st_size, sha256_of(directory / path))
        for path in listed_files(directory)
    }


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


def _bounded(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DamagedBundleError(f"{path.name} has more than {most} bytes; it is no manifest.")
    return content


def _checked(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise DamagedBundleError(f"{MANIFEST}: {what} must be a {kind.__name__}, not {type(value).__name__}.")
    return value


def _entry(entry: Any, path: str) -> FileEntry:
    entry = _checked(entry, dict, f"files[{path!r}]")
    num_bytes, sha256 = entry.get("bytes"), entry.get("sha256")
    if type(num_bytes) is not int or num_bytes < 0:
        raise DamagedBundleError(f"{MANIFEST}: files[{path!r}].bytes={num_bytes!r} is no size.")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DamagedBundleError(f"{MANIFEST}: files[{path!r}].sha256 is no SHA-256.")
    return FileEntry(num_bytes, sha256)


def _program(program: Any, name: str) -> dict[str, Any]:
    """Every field that a reader relies on is there."""
    program = _checked(program, dict, f"programs[{name!r}]")
    for part in ("inputs", "outputs"):
        for array in _checked(program.get(part), list, f"programs[{name!r}].{part}"):
            array = _checked(array, dict, f"an array of programs[{name!r}].{part}")
            check_name(_checked(array.get("name"), str, f"a name in programs[{name!r}]"))
            _checked(array.get("dtype"), str, f"a dtype in programs[{name!r}]")
            dims = _checked(array.get("dims"), list, f"dims in programs[{name!r}]")
            if not all(isinstance(dim, int | str) for dim in dims):
                raise DamagedBundleError(f"{MANIFEST}: dims={dims} in programs[{name!r}] are no sizes.")
    for weight in _checked(program.get("weights"), list, f"programs[{name!r}].weights"):
        _checked(weight, str, f"a weight of programs[{name!r}]")
    return dict(program)
