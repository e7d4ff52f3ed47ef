"""The one door to TensorFlow: here it only queues batches; it must neither log, nor touch a GPU, nor be slow."""

import functools
import os
import sys
from types import ModuleType

__all__ = ["import_tensorflow"]


@functools.cache
def import_tensorflow() -> ModuleType:
    """TensorFlow, without its start-up log, without Keras, and blind to the GPUs, which are JAX's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # both are read once, when the library is loaded
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no TensorFlow kernel computes here: only a notice
    # TensorFlow loads Keras, plots and all, for a registration that it can do without: a quarter of the
    # seconds that the import takes. None in its place reads as "not installed"; `tf.keras` works later.
    without_keras = "keras" not in sys.modules
    if without_keras:
        sys.modules["keras"] = None  # type: ignore[assignment]
    try:
        import tensorflow as tf
    finally:
        if without_keras:
            del sys.modules["keras"]
    tf.config.set_visible_devices([], "GPU")
    return tf
