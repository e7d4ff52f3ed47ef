"""Runs programs of a bundle in ONNX Runtime: a file of requests in, a file of results out.

    python run_onnx.py BUNDLE requests.npz results.npz

It imports onnxruntime and numpy alone: the export runs it as a process of its own to check what it
wrote, and it shows how a bundle is read. `requests.npz` holds `PROGRAM/INPUT` arrays, `results.npz`
`PROGRAM/OUTPUT` arrays.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def main(bundle: str, requests: str, results: str) -> None:
    """Calls every program that has a request."""
    given = dict(np.load(requests, allow_pickle=False))
    found: dict[str, Any] = {}
    for name in sorted({key.split("/")[0] for key in given}):
        path = str(Path(bundle) / "onnx" / f"{name}.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = {key.split("/", 1)[1]: array for key, array in given.items() if key.split("/")[0] == name}
        names = [output.name for output in session.get_outputs()]
        outputs = zip(names, session.run(names, inputs), strict=True)
        found |= {f"{name}/{key}": value for key, value in outputs}
    np.savez(results, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
