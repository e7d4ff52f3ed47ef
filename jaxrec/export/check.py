"""Every artifact is loaded back, in a process of its own where the model's code cannot be imported, and compared.

What it should answer is what the same programs answer in JAX.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Requests = Mapping[str, Mapping[str, np.ndarray]]  # by program, by input
Results = Mapping[str, Mapping[str, np.ndarray]]  # by program, by output

TOLERANCE = 1e-4  # of numbers, relative to 1 or to the number where that is larger
COMPARED_PLACES = 10  # of a list, that must hold the same items
SHOWN_CHARACTERS = 2000


class ArtifactError(ValueError):
    """An artifact does not do what the model does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What was found of a program of an artifact.

    Attributes:
      difference: the largest of its numbers, as `TOLERANCE` counts it.
      lists: that were compared; 0 = the program gives none.
    """

    artifact: str
    program: str
    difference: float
    lists: int


# By script, what its process is refused. TensorFlow and others import what they find, and do without it.
REFUSED = {
    "run_stablehlo.py": ("jaxrec", "flax", "tensorflow"),
    "run_saved_model.py": ("jaxrec", "flax", "jax", "keras"),
    "run_onnx.py": ("jaxrec", "flax", "jax", "tensorflow"),
}
# None in the place of a module reads as "not installed".
APART = """
import runpy, sys
script, refused, *sys.argv[1:] = sys.argv[1:]
sys.modules.update(dict.fromkeys(refused.split(",")))
runpy.run_path(script, run_name="__main__")
"""


def run_apart(script: str, bundle: Path, requests: Requests) -> dict[str, dict[str, np.ndarray]]:
    """What a script of this package answers to the requests, run as a process of its own; see `REFUSED`.

    Raises:
      ArtifactError: it fails; the message holds the end of what it said.
    """
    path = Path(__file__).with_name(script)
    with tempfile.TemporaryDirectory() as place:
        given, results = Path(place, "requests.npz"), Path(place, "results.npz")
        np.savez(given, **_flat(requests))
        refused = ",".join(REFUSED[script])
        command = [
            sys.executable,
            "-P",
            "-c",
            APART,
            str(path),
            refused,
            str(bundle),
            str(given),
            str(results),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_on_cpu(os.environ))
        if done.returncode:
            raise ArtifactError(
                f"{script} failed: {(done.stderr or done.stdout).strip()[-SHOWN_CHARACTERS:]}"
            )
        with np.load(results, allow_pickle=False) as found:
            answers: dict[str, dict[str, np.ndarray]] = {}
            for name, array in found.items():
                program, output = name.split("/", 1)
                answers.setdefault(program, {})[output] = array
    return answers


def compare(artifact: str, expected: Results, found: Results) -> list[Check]:
    """A check for each program.

    Raises:
      ArtifactError: an output is missing, differs by more than the tolerance, or lists other items; says which.
    """
    return [_compare_program(artifact, name, of_program, found) for name, of_program in expected.items()]


def _compare_program(artifact: str, name: str, expected: Mapping[str, np.ndarray], found: Results) -> Check:
    largest, lists = 0.0, 0
    for output, wanted in expected.items():
        where = f"{artifact}: output {output!r} of {name!r}"
        got = found.get(name, {}).get(output)
        if got is None or got.shape != wanted.shape:
            raise ArtifactError(
                f"{where} has the shape {getattr(got, 'shape', None)} instead of {wanted.shape}."
            )
        if wanted.dtype.kind == "f":
            largest = max(largest, difference(wanted, got))
            if not largest <= TOLERANCE:
                raise ArtifactError(
                    f"{where} differs from JAX by {largest:.2g}; at most {TOLERANCE:.0e} is allowed."
                )
        elif output in ("top_item_ids", "top_titles"):
            lists = len(wanted)
            places = slice(COMPARED_PLACES)
            same = got[:, places] == wanted[:, places]
            # Of equal scores (to rounding) either may come first.
            scores = expected["top_scores"][:, : COMPARED_PLACES + 1]
            if not np.all(same | _near_ties(scores)[:, : same.shape[1]]):
                row = int(np.flatnonzero(~same.all(axis=1))[0])
                raise ArtifactError(
                    f"{where} lists {got[row, places].tolist()} instead of {wanted[row, places].tolist()}."
                )
        elif not np.array_equal(got, wanted):
            raise ArtifactError(f"{where} differs from JAX.")
    return Check(artifact=artifact, program=name, difference=largest, lists=lists)


def difference(wanted: np.ndarray, got: np.ndarray) -> float:
    """The largest one, relative to 1 or to the number where that is larger; infinities must be the same."""
    finite = np.isfinite(wanted)
    if not np.array_equal(np.where(finite, 0, wanted), np.where(finite, 0, got)):
        return np.inf
    apart = np.abs(got[finite].astype(np.float64) - wanted[finite])
    return float(np.max(apart / np.maximum(1.0, np.abs(wanted[finite])), initial=0.0))


def _near_ties(scores: np.ndarray) -> np.ndarray:
    """True at places whose score a neighbour has too, to a few roundings."""
    with np.errstate(invalid="ignore"):  # of two infinities
        near = np.abs(np.diff(scores, axis=1)) <= 1e-6 * np.maximum(1.0, np.abs(scores[:, 1:]))
    none = np.zeros((len(scores), 1), bool)
    return np.hstack([none, near]) | np.hstack([near, none])


def _on_cpu(environment: Mapping[str, str]) -> dict[str, str]:
    """The accelerator is this process's."""
    return {**environment, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}


def _flat(requests: Requests) -> dict[str, Any]:
    return {
        f"{program}/{name}": array for program, inputs in requests.items() for name, array in inputs.items()
    }
