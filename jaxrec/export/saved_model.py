"""The programs as a TensorFlow SavedModel, a signature each; ids are the catalogue's own, and titles come with them.

It is written in TensorFlow's own operations (`lowering`), so that it needs no XLA and serves any batch and any length
without compiling. Weights are variables; the vocabularies are hash tables.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from jaxrec.export.catalogue import Catalogue, Vocabulary
from jaxrec.export.lowering import Lowering
from jaxrec.export.programs import ProgramSpec
from jaxrec.export.tensorflow_graph import TensorFlowGraph
from jaxrec.export.weights import HostWeights

DEFAULT = "serving_default"
DEFAULT_PROGRAM = "recommend"
WARM_UP = "assets.extra/tf_serving_warmup_requests"
KEYED = ("item_ids", "exclude_ids", "candidate_ids")  # inputs that are own ids of items
NO_TIME = -1


class ServedModule(tf.Module):
    """The state that the signatures share."""

    def __init__(self, weights: HostWeights, catalogue: Catalogue, users: Vocabulary | None):
        super().__init__()
        # A variable's name is free text for TensorFlow, but for its characters.
        self.served_weights = {
            name: tf.Variable(array, trainable=False, name=name.replace("/", "."))
            for name, array in weights.items()
        }
        self.items = _table(catalogue.vocabulary)
        self.item_keys = tf.Variable(_keys(catalogue.vocabulary), trainable=False, name="item_keys")
        self.titles = tf.Variable(tf.constant(catalogue.titles), trainable=False, name="titles")
        self.users = None if users is None else _table(users)

    def signature(self, program: ProgramSpec) -> Any:
        """The program, of own ids."""

        @functools.partial(tf.function, autograph=False)
        def call(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            given = {array.name: self._to_model(array.name, inputs[array.name]) for array in program.inputs}
            graph, sizes = TensorFlowGraph(), {}
            for array in program.inputs:
                for axis, dim in enumerate(array.dims):
                    if isinstance(dim, str) and dim not in sizes:
                        sizes[dim] = graph.size(given[array.name], axis)
            arguments = [self.served_weights[name].read_value() for name in sorted(program.weights)]
            arguments += [given[name] for name in sorted(given)]
            found = Lowering(graph, sizes).run(program.jaxpr, arguments)
            outputs: dict[str, tf.Tensor] = {}
            for array, value in zip(program.outputs, found, strict=True):
                outputs |= self._from_model(array.name, value)
            return outputs

        return call.get_concrete_function(**self._specs(program))

    def _specs(self, program: ProgramSpec) -> dict[str, tf.TensorSpec]:
        specs = {}
        for array in program.inputs:
            dims = [dim if isinstance(dim, int) else None for dim in array.dims]
            dtype = tf.as_dtype(array.dtype)
            if array.name in KEYED:
                dtype = self.items.key_dtype
            elif array.name == "user_ids":
                assert self.users is not None, "the model reads users"
                dtype = self.users.key_dtype
            elif array.name == "seconds":
                dtype = tf.int64
            specs[array.name] = tf.TensorSpec(dims, dtype, name=array.name)
        return specs

    def _to_model(self, name: str, value: tf.Tensor) -> tf.Tensor:
        if name in KEYED:
            return self.items.lookup(value)
        if name == "user_ids" and self.users is not None:
            return self.users.lookup(value)
        return _since_first(value) if name == "seconds" else value

    def _from_model(self, name: str, value: tf.Tensor) -> dict[str, tf.Tensor]:
        if not name.endswith("item_ids"):
            return {name: value}
        titles = {name.replace("item_ids", "titles"): tf.gather(self.titles, value)}
        return {name: tf.gather(self.item_keys, value)} | (titles if name.startswith("top_") else {})


def write_saved_model(
    programs: Mapping[str, ProgramSpec],
    weights: HostWeights,
    catalogue: Catalogue,
    users: Vocabulary | None,
    directory: Path,
    warm_up: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
) -> None:
    """Writes the model, and requests that TensorFlow Serving sends itself before it says that it is ready.

    Args:
      warm_up: requests by signature, in own ids.

    Raises:
      NotImplementedError: a program does what has no rule.
    """
    with tf.device("/cpu:0"):
        module = ServedModule(weights, catalogue, users)
        signatures = {name: module.signature(program) for name, program in programs.items()}
        signatures[DEFAULT] = signatures[DEFAULT_PROGRAM]
        tf.saved_model.save(module, str(directory), signatures)
    path = directory / WARM_UP
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in warm_up_records(warm_up):
            writer.write(record)


def warm_up_records(warm_up: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Iterator[bytes]:
    """Each request as a `tensorflow.serving.PredictionLog`.

    Its messages are written field by field: the package that defines them asks for another build of TensorFlow.
    Source: tensorflow/serving, apis/prediction_log.proto, predict.proto and model.proto (numbers of the fields).
    """
    for signature, requests in warm_up.items():
        for inputs in requests:
            model_spec = _field(1, b"model") + _field(3, signature.encode())
            request = _field(1, model_spec)
            for name, array in inputs.items():
                tensor = tf.make_tensor_proto(array).SerializeToString()
                request += _field(2, _field(1, name.encode()) + _field(2, tensor))
            yield _field(6, _field(1, request))


def to_own_ids(
    inputs: Mapping[str, np.ndarray], catalogue: Catalogue, users: Vocabulary | None
) -> dict[str, np.ndarray]:
    """A program's inputs as those of its signature."""
    found = {}
    for name, array in inputs.items():
        if name in KEYED:
            array = _keys(catalogue.vocabulary)[array]
        elif name == "user_ids" and users is not None:
            array = _keys(users)[array]
        elif name == "seconds":
            array = array.astype(np.int64)
        found[name] = array
    return found


def from_own_ids(outputs: Mapping[str, np.ndarray], catalogue: Catalogue) -> dict[str, np.ndarray]:
    """A program's outputs as those of its signature."""
    found = {}
    for name, array in outputs.items():
        if name.endswith("item_ids"):
            found[name] = _keys(catalogue.vocabulary)[array]
            if name.startswith("top_"):
                found[name.replace("item_ids", "titles")] = np.array(catalogue.titles, np.str_)[array]
        else:
            found[name] = array
    return found


def _keys(vocabulary: Vocabulary) -> np.ndarray:
    """Own ids by the model's id; the padding's at 0."""
    keys = [vocabulary.padding, *vocabulary.keys.to_pylist()]
    return np.array(keys, np.str_) if vocabulary.is_text else np.array(keys, np.int64)


def _table(vocabulary: Vocabulary) -> tf.lookup.StaticHashTable:
    keys = _keys(vocabulary)[1:]
    initializer = tf.lookup.KeyValueTensorInitializer(
        tf.constant(keys), tf.range(1, len(keys) + 1, dtype=tf.int32)
    )
    return tf.lookup.StaticHashTable(initializer, default_value=0)


def _since_first(seconds: tf.Tensor) -> tf.Tensor:
    """From seconds of any clock to those since the first known moment of each row; below 0 = unknown."""
    known = seconds >= 0
    first = tf.reduce_min(tf.where(known, seconds, tf.int64.max), axis=1, keepdims=True)
    passed = tf.minimum(seconds - first, tf.constant(2**31 - 1, tf.int64))
    return tf.cast(tf.where(known, passed, tf.constant(NO_TIME, tf.int64)), tf.int32)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes in a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
