"""The programs as files for each runtime; each is loaded back in a clean process and compared with JAX at once."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxrec import __version__
from jaxrec.export import layout
from jaxrec.export.catalogue import USERS_FILE, Catalogue, read_users
from jaxrec.export.check import Check, Requests, Results, compare, run_apart
from jaxrec.export.programs import ProgramSpec
from jaxrec.export.requests import sized_request, warm_up_requests
from jaxrec.export.weights import HostWeights

__all__ = ["Artifacts", "Say", "expected_results"]

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifacts:
    """What is written into a bundle, and how it is checked.

    Attributes:
      place: of the bundle; its manifest, weights and vocabularies are there.
      lengths: of history that the user tower is written for, each with every batch size.
      requests, expected: what each program is asked, and what JAX answers.
    """

    place: Path
    programs: Mapping[str, ProgramSpec]
    weights: HostWeights
    lengths: Sequence[int]
    requests: Requests
    expected: Results

    def write(self, *, saved_model: bool, onnx: bool, say: Say) -> list[Check]:
        """Writes them; StableHLO always.

        Raises:
          ArtifactError: one does not do what the model does.
          NotImplementedError: a program does what another runtime cannot.
        """
        say("StableHLO")
        checks = self._stablehlo()
        if saved_model:
            say("TensorFlow SavedModel")
            checks += self._saved_model()
        if onnx:
            say("ONNX")
            checks += self._onnx()
        return checks

    def _stablehlo(self) -> list[Check]:
        directory = self.place / layout.STABLEHLO
        directory.mkdir()
        for name, program in self.programs.items():
            (directory / name).write_bytes(program.stablehlo())
        requests, expected = self._sized_towers(directory)
        found = run_apart("run_stablehlo.py", self.place, {**self.requests, **requests})
        return compare("StableHLO", {**self.expected, **expected}, found)

    def _sized_towers(self, directory: Path) -> tuple[Requests, Results]:
        """Writes the user tower of each size; what it is asked is of what the one of any size was asked."""
        tower = self.programs[layout.USER_TOWER]
        requests, expected = {}, {}
        for num_rows, length in itertools.product(layout.BATCH_SIZES, self.lengths):
            name = layout.sized_program(layout.USER_TOWER, num_rows, length)
            sized = tower.stablehlo([layout.SIZED_PLATFORM], b=num_rows, l=length)
            (directory / name).write_bytes(sized)
            rows, requests[name] = sized_request(self.requests[layout.USER_TOWER], num_rows, length)
            expected[name] = {key: array[rows] for key, array in self.expected[layout.USER_TOWER].items()}
        return requests, expected

    def _saved_model(self) -> list[Check]:
        from jaxrec.export.saved_model import from_own_ids, to_own_ids, write_saved_model

        catalogue = Catalogue.read(self.place)
        users = read_users(self.place) if (self.place / USERS_FILE).exists() else None
        own = {name: to_own_ids(inputs, catalogue, users) for name, inputs in self.requests.items()}
        directory = self.place / layout.SAVED_MODEL
        write_saved_model(self.programs, self.weights, catalogue, users, directory, warm_up_requests(own))
        named = {name: from_own_ids(outputs, catalogue) for name, outputs in self.expected.items()}
        return compare("SavedModel", named, run_apart("run_saved_model.py", self.place, own))

    def _onnx(self) -> list[Check]:
        from jaxrec.export.onnx_graph import write_onnx

        write_onnx(self.programs, self.weights, self.place / layout.ONNX, __version__)
        return compare("ONNX", self.expected, run_apart("run_onnx.py", self.place, self.requests))


def expected_results(
    programs: Mapping[str, ProgramSpec], weights: HostWeights, requests: Requests
) -> dict[str, dict[str, np.ndarray]]:
    """What JAX answers."""
    found = {}
    for name, program in programs.items():
        read = {key: weights[key] for key in program.weights}
        outputs = jax.jit(program.function)(read, dict(requests[name]))
        found[name] = {key: np.asarray(value) for key, value in outputs.items()}
    return found
