"""Runs signatures of a SavedModel in plain TensorFlow: a file of requests in, a file of results out.

    python run_saved_model.py BUNDLE requests.npz results.npz

It imports tensorflow and numpy alone: the export runs it as a process of its own to check what it
wrote, and it shows how a bundle is read. `requests.npz` holds `SIGNATURE/INPUT` arrays, `results.npz`
`SIGNATURE/OUTPUT` arrays.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf


def main(bundle: str, requests: str, results: str) -> None:
    """Calls every signature that has a request."""
    model = tf.saved_model.load(str(Path(bundle) / "saved_model" / "1"))
    given = dict(np.load(requests, allow_pickle=False))
    found = {}
    for name in sorted({key.split("/")[0] for key in given}):
        inputs = {
            key.split("/", 1)[1]: tf.constant(array)
            for key, array in given.items()
            if key.split("/")[0] == name
        }
        for key, value in model.signatures[name](**inputs).items():
            array = value.numpy()
            if array.dtype == object:  # strings
                array = np.char.decode(array.astype(np.bytes_), "utf-8")
            found[f"{name}/{key}"] = array
    np.savez(results, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
