"""The ways to make a trained model smaller, each under a name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrec.compression.codes import Code, Plain, RowCodes
from jaxrec.compression.files import SCAN, CompressedModel
from jaxrec.compression.parameters import MEMORY, TABLE, Arrays
from jaxrec.compression.product_codes import ProductCodes
from jaxrec.config import TrainConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.models.memory import SUCCESSORS
from jaxrec.models.two_tower import ITEM, ITEM_OUTPUT
from jaxrec.nn.integer_products import Products
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState

Numbers = Literal["int8", "int4"]
SMALLEST = 256  # entries; an array of fewer stays as it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A trained run, opened to be compressed; use it under `jax.set_mesh(source.setup.mesh)`.

    Attributes:
      arrays: of `state`, as evaluation reads them (`parameters`).
    """

    config: TrainConfig
    dataset: PreparedDataset
    setup: Setup
    state: TrainState
    step: int
    arrays: Arrays

    def model(self, codes: Mapping[str, Code], *, num_candidates: int = 0) -> CompressedModel:
        """The run in these codes."""
        return CompressedModel(
            config=self.config,
            fingerprint=self.dataset.metadata.fingerprint,
            step=self.step,
            codes=codes,
            num_candidates=num_candidates,
        )

    def original(self) -> CompressedModel:
        """The run as it is: what the others are held against."""
        return self.model({name: Plain.of(array) for name, array in self.arrays.items()})


class MethodRefusedError(ValueError):
    """A method cannot be applied to this run; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the methods."""

    def compress(self, source: Source) -> CompressedModel:
        """The smaller model.

        Raises:
          MethodRefusedError: the run has not what the method takes away, or holds numbers that it cannot encode.
        """
        raise TypeError(f"{type(self).__name__} must define compress")

    def finish(self, directory: Path, source: Source, model: CompressedModel) -> None:
        """Writes what goes beside the model; most methods have nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization(Method):
    """Arrays as codes. Vectors and the smallest arrays stay float32; a memory's counts become float16.

    Attributes:
      tables: of rows; "product" = the tables of items by product codes, others as int8.
      dense: of kernels and of what else is a matrix among the dense parameters.
      group: entries that share a scale in a row of int4; int8 rows have one scale.
      part_dim: entries of a part of product codes, where they divide the row.
      products: of the encoder's maps; "int8" = activations are whole numbers too.
      num_candidates: that product codes choose, to be scored by int8 rows; 0 = product codes alone.
    """

    tables: Literal["int8", "int4", "product"]
    dense: Numbers
    group: int = 32
    part_dim: int = 8
    products: Products = "float"
    num_candidates: int = 0

    def compress(self, source: Source) -> CompressedModel:
        """See `Method`."""
        if self.num_candidates and source.setup.model.mixture is not None:
            raise MethodRefusedError(
                "model.mixture is set, and candidates are scored anew by products; take another method."
            )
        codes: dict[str, Code] = {}
        scored = f"{TABLE}.{source.setup.model.scored_table}"
        for name, array in source.arrays.items():
            try:
                codes[name] = self._code(name, array)
                if self.num_candidates and name == scored:
                    codes[SCAN + name] = self._product(array)
            except ValueError as error:
                raise MethodRefusedError(f"{name}: {error}") from error
        config = with_encoder(source.config, products=self.products)
        return dataclasses.replace(source, config=config).model(codes, num_candidates=self.num_candidates)

    def _code(self, name: str, array: np.ndarray) -> Code:
        room, _, path = name.partition(".")
        if room == MEMORY:
            return _narrow_ids(array) if path == SUCCESSORS else _half(array)
        if room == TABLE:
            if array.shape[1] == 1:
                return _half(array)
            if self.tables == "product" and path in (ITEM, ITEM_OUTPUT) and not self.num_candidates:
                return self._product(array)
            return RowCodes.of(array, bits=4, group=self.group) if self.tables == "int4" else _int8(array)
        if array.ndim < 2 or array.size < SMALLEST:
            return Plain.of(array)
        num_inputs = input_dims(path)
        if self.dense == "int8":
            return _int8(array, num_inputs)
        return RowCodes.of(array, bits=4, group=self.group, num_inputs=num_inputs)

    def _product(self, table: np.ndarray) -> ProductCodes:
        dim = table.shape[1]
        fitting = [size for size in range(1, self.part_dim + 1) if dim % size == 0]
        return ProductCodes.of(table, part_dim=max(fitting))


def with_encoder(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with some fields of its encoder changed."""
    encoder = dataclasses.replace(config.model.encoder, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


def input_dims(path: str) -> int:
    """Leading dims that a kernel sums over, by its path; 0 = it is a table, whose rows are its last dim."""
    if path.endswith("attention.out_kernel"):
        return 2
    kernels = ("kernel", "projection", "qkv_kernel", "query_kernel", "key_kernel")
    return 1 if path.rpartition(".")[2] in kernels else 0


def _int8(array: np.ndarray, num_inputs: int = 0) -> RowCodes:
    return RowCodes.of(array, bits=8, num_inputs=num_inputs)


def _half(array: np.ndarray) -> Plain:
    largest = np.abs(array).max(initial=0.0)
    return Plain.of(array, "float16" if largest <= np.finfo(np.float16).max else None)


def _narrow_ids(array: np.ndarray) -> Plain:
    return Plain.of(array, "uint16" if array.max(initial=0) <= np.iinfo(np.uint16).max else None)
