"""Compiles a version's programs in a process of its own, while the versions in use answer.

For seconds the compiler takes every core, and for moments the interpreter's lock: requests would wait. The process
works when nothing else does, and leaves what it made in JAX's compilation cache, from which the server reads it.
"""

import asyncio
import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from jaxrec.export.bundle import Bundle
from jaxrec.serving.ranker import Needs
from jaxrec.serving.version import Version

__all__ = ["keep_programs", "precompile"]

MOST_SECONDS = 900.0
MOST_WORDS = 2_000  # bytes of what a failed process said

log = logging.getLogger(__name__)


def keep_programs() -> None:
    """Lets this process read what another one compiled.

    The cache lives as long as the process, unless `JAX_COMPILATION_CACHE_DIR` names a directory that stays.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        directory = tempfile.mkdtemp(prefix="jaxrec-programs-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


async def precompile(directory: str | Path, needs: Needs = Needs()) -> bool:
    """Whether the programs of a version lie in the cache now; what went wrong is in the log, and changes nothing.

    An accelerator belongs to the process that has it, and without a cache there is nowhere to put them: False.

    Args:
      needs: the task heads that its formula names are compiled, too.
    """
    cache = jax.config.values["jax_compilation_cache_dir"]
    if cache is None or jax.default_backend() != "cpu":
        return False
    nice = shutil.which("nice")
    command = [
        *((nice, "-n", "19") if nice else ()),  # from its first import on
        *(sys.executable, "-m", __name__, str(directory), *sorted(needs.columns)),
    ]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with tempfile.TemporaryFile() as said:
        # Not asyncio's: to start one, it copies the pages of this process.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            status = await asyncio.to_thread(process.wait, MOST_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning(
                "%s is compiled by the server itself: ahead it took over %.0f s", directory, MOST_SECONDS
            )
            return False
        finally:
            process.kill()
            process.wait()
        if status:
            said.seek(max(0, said.seek(0, os.SEEK_END) - MOST_WORDS))
            words = said.read().decode(errors="replace").strip()
            log.warning("%s is compiled by the server itself: %s", directory, words)
    return status == 0


def main() -> None:
    """The process: compiles towers and task heads of a version, of which it reads no more than that takes."""
    directory, *columns = sys.argv[1:]
    try:
        version = Version(Bundle.open(directory))
        version.compile()
        Needs(columns=frozenset(columns)).ranker(version)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
