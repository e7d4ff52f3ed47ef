"""Runs programs of a bundle in JAX, without the code that made them: a file of requests in, a file of results out.

    python run_stablehlo.py BUNDLE requests.npz results.npz

It imports jax, numpy and safetensors alone: the export runs it as a process of its own to
check what it wrote, and it shows how a bundle is read. `requests.npz` holds `PROGRAM/INPUT`
arrays, `results.npz` `PROGRAM/OUTPUT` arrays.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

# Many programs that run once: LLVM's passes, which change no program, would take longer than all else.
QUICKLY = {"xla_backend_optimization_level": 0}


def main(bundle: str, requests: str, results: str) -> None:
    """Calls every program that has a request."""
    directory = Path(bundle)
    weights = load_file(directory / "item_vectors.safetensors") | load_file(directory / "weights.safetensors")
    programs = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["programs"]
    given = dict(np.load(requests, allow_pickle=False))
    found: dict[str, Any] = {}
    for name in sorted({key.split("/")[0] for key in given}):
        exported = jax.export.deserialize(bytearray((directory / "stablehlo" / name).read_bytes()))
        inputs = {key.split("/", 1)[1]: array for key, array in given.items() if key.split("/")[0] == name}
        read = programs[name.split(".")[0]]["weights"]  # "user_tower.4x32" is one of known sizes
        call = jax.jit(exported.call, compiler_options=QUICKLY)
        outputs = call({key: weights[key] for key in read}, inputs)
        found |= {f"{name}/{key}": np.asarray(value) for key, value in outputs.items()}
    np.savez(results, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
