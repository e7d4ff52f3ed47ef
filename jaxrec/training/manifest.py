"""What a complete checkpoint says of itself: the arrays it holds, and the size and checksum of each of its files.

The manifest is a JSON file with a checksum of its own. It is written after every other file and inside the commit of
the step, so that a step is complete exactly when its manifest is there.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from etils import epath

MANIFEST = "manifest.json"
FORMAT = 1
# Orbax rewrites these (commit time) after the manifest is made; they hold nothing that a restore needs.
UNCHECKED_FILES = frozenset({MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"})
CHUNK_BYTES = 1 << 22
CHECKSUM_THREADS = 4
SHOWN_PROBLEMS = 8


class DamagedError(ValueError):
    """The files of a step are not those that its manifest tells of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of one step.

    Attributes:
        arrays: shape and dtype of each array, by its path in the state.
        files: bytes and CRC-32 of each file, by its path in the directory.
        metadata: small JSON values of the caller.
    """

    step: int
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    files: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, Any]

    @classmethod
    def of_state(cls, step: int, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> Self:
        """The manifest of a step whose files are not written yet.

        Raises:
            ValueError: the metadata have no JSON form.
        """
        try:
            metadata = json.loads(json.dumps(dict(metadata)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metadata of step {step} must be plain JSON values: {error}.") from error
        return cls(step=step, arrays=_described(arrays), files={}, metadata=metadata)

    def write(self, directory: epath.Path) -> None:
        """Checks the files of `directory` in, and writes the manifest beside them."""
        names = sorted(_relative_files(directory))
        with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
            sums = pool.map(lambda name: _size_and_crc(directory / name), names)
            files = dict(zip(names, sums, strict=True))
        body = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(self, files=files))}
        (directory / MANIFEST).write_text(json.dumps({"crc32": _crc_of(body), **body}, indent=1))

    @classmethod
    def read(cls, directory: epath.Path) -> Self:
        """The manifest of a step.

        Raises:
            DamagedError: it is not what was written.
        """
        try:
            body = json.loads((directory / MANIFEST).read_bytes())
            if body.pop("crc32") != _crc_of(body):
                raise DamagedError("its manifest does not match its own checksum")
            if body["format"] != FORMAT:
                raise DamagedError(f"its format is {body['format']}, and this program reads {FORMAT}")
            return cls(
                step=body["step"],
                arrays={path: (tuple(shape), dtype) for path, (shape, dtype) in body["arrays"].items()},
                files={name: (size, crc) for name, (size, crc) in body["files"].items()},
                metadata=body["metadata"],
            )
        except DamagedError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise DamagedError(f"its manifest cannot be read: {error!r}") from error

    def check_files(self, directory: epath.Path, *, part: int = 0, num_parts: int = 1) -> None:
        """Reads every `num_parts`-th file, from the `part`-th on, and compares it with its entry.

        Raises:
            DamagedError: a file is missing, or has another size or checksum.
        """

        def check(name: str) -> None:
            try:
                found = _size_and_crc(directory / name)
            except OSError as error:
                raise DamagedError(f"{name} cannot be read: {error}") from error
            if found != self.files[name]:
                raise DamagedError(f"{name} has (bytes, CRC-32) {found} instead of {self.files[name]}")

        with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
            list(pool.map(check, sorted(self.files)[part::num_parts]))

    def check_state(self, wanted: Mapping[str, Any], where: epath.Path, *, partial: bool) -> None:
        """Compares the arrays with those that a run wants; with `partial`, it may want fewer.

        Raises:
            ValueError: they differ; the message names the paths.
        """
        described = _described(wanted)
        problems = [f"{path!r} is not in the checkpoint" for path in described if path not in self.arrays]
        if not partial:
            problems += [
                f"{path!r} is only in the checkpoint" for path in self.arrays if path not in described
            ]
        for path, (shape, dtype) in described.items():
            kept_shape, kept_dtype = self.arrays.get(path, (shape, dtype))
            if (kept_shape, kept_dtype) != (shape, dtype):
                problems.append(
                    f"{path!r} is {kept_dtype}{list(kept_shape)} in the checkpoint and {dtype}{list(shape)} in this run"
                )
        if problems:
            more = len(problems) - SHOWN_PROBLEMS
            raise ValueError(
                f"{where} holds another state: {'; '.join(problems[:SHOWN_PROBLEMS])}"
                f"{f'; and {more} more' if more > 0 else ''}. Use the config that wrote it, or another workdir."
            )


def _described(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {path: (tuple(array.shape), np.dtype(array.dtype).name) for path, array in arrays.items()}


def _relative_files(root: epath.Path, prefix: str = "") -> list[str]:
    names: list[str] = []
    for path in (root / prefix).iterdir() if prefix else root.iterdir():
        name = f"{prefix}/{path.name}" if prefix else path.name
        names += _relative_files(root, name) if path.is_dir() else [name]
    return [name for name in names if name not in UNCHECKED_FILES]


def _size_and_crc(path: epath.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return size, crc


def _crc_of(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
