"""A compressed model on disk: `model.safetensors` with the codes, `model.json` with what they mean. No pickle.

Everything is checked against the config that lies beside it before an array is read.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrec.compression.codes import Code, Plain, RowCodes, code_from_arrays
from jaxrec.compression.product_codes import ProductCodes
from jaxrec.config import TrainConfig, from_json, to_json

ARRAYS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"
FORMAT = 1
KINDS: dict[str, type[Code]] = {kind.kind: kind for kind in (Plain, RowCodes, ProductCodes)}
MOST_DESCRIPTION_BYTES = 1 << 26
SCAN = "scan."  # codes that choose candidates, beside those of the same table that rescore them

_DTYPES = {"F32": "float32", "F16": "float16", "I8": "int8", "U8": "uint8", "U16": "uint16", "I32": "int32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedModel:
    """A model in codes.

    Attributes:
      config: of the run; of the smaller model where it was pruned.
      fingerprint: of the data that it was trained on.
      step: of the state that was compressed.
      codes: by the names of `parameters`; `scan.<name>` are those that choose candidates.
      num_candidates: that are scored anew by the rows of the table itself; 0 = all scores are final.
    """

    config: TrainConfig
    fingerprint: str
    step: int
    codes: Mapping[str, Code]
    num_candidates: int = 0

    @property
    def num_bytes(self) -> int:
        """Of all codes."""
        return sum(code.num_bytes for code in self.codes.values())


def write_model(directory: Path, model: CompressedModel) -> None:
    """Writes the directory at once; one that is there is replaced."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    arrays = {
        f"{name}/{field}": np.asarray(array, order="C")  # a number stays one
        for name, code in model.codes.items()
        for field, array in code.arrays.items()
    }
    save_file(arrays, temporary / ARRAYS_FILE)
    description = {
        "format": FORMAT,
        "step": model.step,
        "data_fingerprint": model.fingerprint,
        "num_candidates": model.num_candidates,
        "codes": {name: code.describe() for name, code in model.codes.items()},
        "config": json.loads(to_json(model.config)),
    }
    (temporary / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)


def read_model(directory: Path) -> CompressedModel:
    """Reads what `write_model` wrote; nothing is allocated before every shape is known to be as described.

    Raises:
      ValueError: there is no compressed model, or it is damaged; the message names the file and the array.
    """
    description = _read_description(directory / DESCRIPTION_FILE)
    path = directory / ARRAYS_FILE
    try:
        with safe_open(path, framework="np") as file:
            stored: dict[str, dict[str, _Shape]] = {}
            for key in file.keys():  # noqa: SIM118, it is no dict
                name, _, field = key.rpartition("/")
                part = file.get_slice(key)
                stored.setdefault(name, {})[field] = _Shape(tuple(part.get_shape()), part.get_dtype())
            described = description["codes"]
            if stored.keys() != described.keys():
                missing = sorted(stored.keys() ^ described.keys())
                raise ValueError(f"{missing[0]} lies in one of {ARRAYS_FILE} and {DESCRIPTION_FILE} alone.")
            _check_bytes(path, stored)
            codes = {}
            for name, fields in stored.items():
                try:
                    code_from_arrays(KINDS, described[name], fields)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name}: {error}") from error
                arrays = {field: file.get_tensor(f"{name}/{field}") for field in fields}
                codes[name] = code_from_arrays(KINDS, described[name], arrays)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error} Compress the run again.") from error
    return CompressedModel(
        config=description["config"],
        fingerprint=str(description["data_fingerprint"]),
        step=int(description["step"]),
        codes=codes,
        num_candidates=int(description["num_candidates"]),
    )


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the header of a file says of an array."""

    shape: tuple[int, ...]
    stored_dtype: str

    @property
    def dtype(self) -> str:
        return _DTYPES.get(self.stored_dtype, self.stored_dtype)


def _check_bytes(path: Path, stored: Mapping[str, Mapping[str, _Shape]]) -> None:
    shapes = [one for fields in stored.values() for one in fields.values()]
    for one in shapes:
        if one.stored_dtype not in _DTYPES:
            raise ValueError(f"it holds an array of {one.stored_dtype}; codes are {', '.join(_DTYPES)}.")
    total = sum(math.prod(one.shape) * np.dtype(one.dtype).itemsize for one in shapes)
    if total > path.stat().st_size:
        raise ValueError(f"its arrays need {total} bytes, and it has {path.stat().st_size}.")


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} holds no compressed model ({path.name} is missing); make one with "
            "python -m jaxrec.compress."
        )
    if path.stat().st_size > MOST_DESCRIPTION_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and a description has at most {MOST_DESCRIPTION_BYTES}; "
            "compress the run again."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']} is not {FORMAT}, the one that this version reads")
        found["config"] = from_json(json.dumps(found["config"]), TrainConfig)
        if not isinstance(found["codes"], dict) or int(found["num_candidates"]) < 0 or int(found["step"]) < 0:
            raise ValueError("codes, num_candidates or step is not what it must be")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); compress the run again.") from error
    return found
