"""The programs as files for each runtime; each is loaded back in a clean process and compared with JAX at once."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
      facts: of the manifest: they say what sizes a server compiles for.
      requests, expected: what each program is asked, and what JAX answers.
    """

    place: Path
    programs: Mapping[str, ProgramSpec]
    weights: HostWeights
    facts: Mapping[str, Any]
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
        requests, expected = self._sized_programs(directory)
        found = run_apart("run_stablehlo.py", self.place, {**self.requests, **requests})
        return compare("StableHLO", {**self.expected, **expected}, found)

    def _sized_programs(self, directory: Path) -> tuple[Requests, Results]:
        """Writes the programs of a server's sizes; what they are asked is of what those of any size were asked.

        Every user tower is asked, for all answers come of these; of the task heads the largest stands for the others,
        which differ from it in numbers alone: to compile takes its time.
        """
        requests, expected = {}, {}
        for name in filter(self.programs.__contains__, layout.SIZED_PROGRAMS):
            sizes = layout.known_sizes(name, self.facts)
            for size in sizes:
                file = layout.sized_program(name, *size)
                numbers = dict(zip("blc", size, strict=False))
                program = self.programs[name].stablehlo([layout.SIZED_PLATFORM], **numbers)
                (directory / file).write_bytes(program)
                if name == layout.USER_TOWER or size == sizes[-1]:
                    requests[file], expected[file] = sized_request(
                        self.requests[name], self.expected[name], size
                    )
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
