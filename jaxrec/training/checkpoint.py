"""Checkpoints: save a state in the background, restore the newest one that is whole. The only door to Orbax.

One directory per step, named by the number of updates applied, with a manifest beside Orbax's files (manifest.py). A
kill at any moment leaves complete steps, and leftovers that are ignored and later removed.

The three rules of a restore:
  1. the newest complete step wins; other directories are ignored;
  2. a damaged step (its files do not match its manifest) is reported and the one before it is taken;
  3. a state of another shape is an error that names the path, never a reason to fall back.

With several processes every method but `reached_preemption` is collective, the directory is shared between them,
and process 0 decides which step is meant.
"""

import errno
import logging
import os
import signal
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxrec.training.manifest import MANIFEST, DamagedError, Manifest

logger = logging.getLogger(__name__)

TEMPORARY_MARK = ".orbax-checkpoint-tmp"
ORBAX_TREE_FILE = "_METADATA"
NO_STEP = -1


class DamagedCheckpointError(ValueError):
    """Every complete checkpoint of the directory is damaged."""


class Checkpoints:
    """Saves and restores the steps of one directory; use it as a context manager.

    Args:
        directory: where the steps lie; made at the first save. A reader never changes it.
        keep: how many complete steps stay; older ones are removed once a newer one is complete.
        save_every_steps: `save` writes at multiples of this, unless forced.

    Raises:
        ValueError: `keep` or `save_every_steps` is not positive.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, save_every_steps: int):
        for name, value in {"keep": keep, "save_every_steps": save_every_steps}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        path = epath.Path(directory)
        self.directory = path if "://" in os.fspath(directory) else path.absolute()
        self.keep = keep
        self.save_every_steps = save_every_steps
        self._seen = NO_STEP  # newest step that the caller knows of
        self._damaged: set[int] = set()
        self._pending: Manifest | None = None
        self._writer: ocp.AsyncCheckpointer | None = None
        self._sigterm: _SigtermFlag | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
            # The error that ended the run comes first; this one must not hide it.
            logger.exception("The last checkpoint of %s was not written.", self.directory)
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._sigterm is not None:
                self._sigterm.uninstall()
                self._sigterm = None

    def save(
        self, step: int, state: Any, *, force: bool = False, metadata: Mapping[str, Any] | None = None
    ) -> bool:
        """Starts to write `state` as `step`; returns whether it did.

        The arrays are copied before it returns, so that the caller may donate them. A step that is already complete
        is not written again. Steps newer than this one belong to a future that the run went back from; they are
        removed once this one is complete.

        Args:
            step: the number of updates applied.
            state: pytree of arrays.
            force: write although `step` is not a multiple of `save_every_steps`.
            metadata: small JSON values kept beside the arrays, such as the metric of a best checkpoint.

        Raises:
            ValueError: there is a newer step that the caller never asked for, so that a run may be lost; or a leaf is
                not an array.
            OSError: this or the previous save could not be written (no space, no permission).
        """
        if not force and step % self.save_every_steps:
            return False
        self.wait()
        newest = self._newest()
        if step == newest:
            return False
        if newest > max(step, self._seen):
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {newest}, which was not restored first."
                " Restore it, or name another directory."
            )
        arrays = _flatten(state)
        self._pending = Manifest.of_state(step, arrays, metadata or {})
        try:
            if self._writer is None:
                self._writer = self._open_writer()
            # The copies to the host are meant: a guard of the training loop must not refuse them.
            with jax.transfer_guard("allow"):
                # `force` writes over a damaged step of that number.
                self._writer.save(self.directory / str(step), args=ocp.args.PyTreeSave(arrays), force=True)
        except Exception as error:
            raise self._write_error(error) from error
        return True

    def _open_writer(self) -> ocp.AsyncCheckpointer:
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"jaxrec: {self.directory} is open")
        return ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=True),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            # Two writers (the newest and the best) must not meet at one barrier.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=self.directory.name, active_processes=set(range(jax.process_count()))
            ),
        )

    def _write_manifest(self) -> None:
        """Runs in process 0 after the arrays are written and before Orbax renames the step into place."""
        assert self._pending is not None
        step = str(self._pending.step)
        temporary = [path for path in self.directory.iterdir() if path.name.startswith(step + TEMPORARY_MARK)]
        # On stores without a rename Orbax writes into the final directory.
        self._pending.write(temporary[0] if temporary else self.directory / step)

    def wait(self) -> None:
        """Blocks until the save in flight is complete, then removes the steps that are no longer kept.

        Raises:
            OSError: the save could not be written; the earlier steps are untouched.
        """
        if self._writer is None or self._pending is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._write_error(error) from error
        self._seen = self._pending.step
        self._damaged.discard(self._seen)
        self._pending = None
        if jax.process_index() == 0:
            self._remove_others(self._seen)

    def _write_error(self, error: Exception) -> OSError:
        step = self._pending.step if self._pending else None
        self._pending = None
        if jax.process_index() == 0:
            self._remove_leftovers()  # gives the space of the half-written step back
        reason = str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or any(
            sign in reason for sign in ("ENOSPC", "No space left", "EDQUOT", "RESOURCE_EXHAUSTED")
        )
        remedy = (
            "The disk is full: free some space or lower keep_checkpoints"
            if full
            else "Check that the directory can be written"
        )
        return OSError(
            errno.ENOSPC if full else errno.EIO,
            f"step {step} could not be saved in {self.directory}: {reason[:500]}. {remedy}; the earlier checkpoints"
            " are untouched, and the run resumes from the newest of them.",
        )

    def latest_step(self) -> int | None:
        """The newest complete step that no restore found damaged, or None."""
        self._seen = self._newest()
        return None if self._seen == NO_STEP else self._seen

    def _newest(self) -> int:
        newest = NO_STEP
        if jax.process_index() == 0:
            newest = max(
                (step for step in self._complete_steps() if step not in self._damaged), default=NO_STEP
            )
        return _from_first(newest)

    def restore_latest(self, abstract: Any, *, partial: bool = False) -> tuple[int, Any] | None:
        """Restores the newest complete step onto the shardings of `abstract`; None where there is no checkpoint.

        Args:
            abstract: pytree of `jax.ShapeDtypeStruct` with shardings (see `abstract_like`), on any mesh, and of NumPy
                arrays, which stand for arrays that are to be read onto the host.
            partial: `abstract` may leave out arrays of the checkpoint, which are then not read.

        Raises:
            DamagedCheckpointError: there are complete steps, and all are damaged.
            ValueError: the checkpoint holds another state; the message names the paths.
        """
        found = self.latest_manifest()
        if found is None:
            return None
        path = self.directory / str(found.step)
        wanted = _flatten(abstract)
        found.check_state(wanted, path, partial=partial)
        arguments = {name: _restore_arguments(name, leaf) for name, leaf in wanted.items()}
        with ocp.PyTreeCheckpointer(use_ocdbt=True) as reader, jax.transfer_guard("allow"):
            restored = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=partial),
            )
        logger.info("Restored step %d from %s.", found.step, self.directory)
        return found.step, jax.tree.unflatten(
            jax.tree.structure(abstract), [restored[name] for name in wanted]
        )

    def latest_metadata(self) -> dict[str, Any] | None:
        """The `metadata` of the newest intact step, or None where there is no checkpoint.

        Raises:
            DamagedCheckpointError: there are complete steps, and all are damaged.
        """
        found = self.latest_manifest()
        return None if found is None else dict(found.metadata)

    def latest_manifest(self) -> Manifest | None:
        """What the newest intact step holds, or None where there is no checkpoint; raises as `latest_metadata` does."""
        self.wait()
        while (step := self.latest_step()) is not None:
            path = self.directory / str(step)
            manifest, problem = None, "another process found it so"
            try:
                manifest = Manifest.read(path)
                if manifest.step != step:
                    raise DamagedError(f"its manifest is of step {manifest.step}")
                manifest.check_files(path, part=jax.process_index(), num_parts=jax.process_count())
            except DamagedError as error:
                manifest, problem = None, str(error)
            # One process that reads a damaged block is enough to refuse the step everywhere.
            if _all_true(manifest is not None) and manifest is not None:
                return manifest
            logger.warning("Checkpoint %s is damaged (%s); falling back to the one before it.", path, problem)
            self._damaged.add(step)
        if self._damaged:
            raise DamagedCheckpointError(
                f"every checkpoint in {self.directory} is damaged: steps {sorted(self._damaged)}. Copy an intact one"
                " there, or start again in an empty workdir."
            )
        return None

    def _complete_steps(self) -> list[int]:
        if not self.directory.exists():
            return []
        names = [
            path.name for path in self.directory.iterdir() if path.name.isascii() and path.name.isdigit()
        ]
        # str(int(...)): "08" is not a step of ours.
        return sorted(
            int(name)
            for name in names
            if str(int(name)) == name and (self.directory / name / MANIFEST).exists()
        )

    def _remove_others(self, newest: int) -> None:
        """Keeps `newest` and the intact steps before it, `keep` in all; damaged newer ones stay for the user to see."""
        complete = self._complete_steps()
        intact = [step for step in complete if step not in self._damaged and step <= newest]
        oldest = intact[-self.keep :][0] if intact else newest
        for step in complete:
            if step < oldest or (step > newest and step not in self._damaged):
                path = self.directory / str(step)
                if "://" not in os.fspath(path):
                    # Out of the way at once: a kill in the middle leaves a leftover and no half step.
                    path = path.rename(self.directory / f"removed-{step}{TEMPORARY_MARK}")
                else:
                    (path / MANIFEST).unlink()
                path.rmtree()

    def _remove_leftovers(self) -> None:
        """Removes what killed or failed saves and removals left behind; other directories are not touched."""
        if not self.directory.exists():
            return
        for path in self.directory.iterdir():
            half_removed = (
                path.name.isdigit() and (path / ORBAX_TREE_FILE).exists() and not (path / MANIFEST).exists()
            )
            if TEMPORARY_MARK in path.name or half_removed:
                logger.info("Removing the leftover %s of an interrupted save.", path)
                path.rmtree(missing_ok=True)

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is about to be taken away and `step` is the one to save; call it at every step.

        With several processes SIGTERM to any of them makes all answer True at one and the same step. The first call
        takes SIGTERM over from its default, which is to die at once.
        """
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        if self._sigterm is None:
            self._sigterm = _SigtermFlag()
        return self._sigterm.raised


def abstract_like(state: Any) -> Any:
    """The shapes, dtypes and shardings of a state of `jax.Array`s: the template for `restore_latest`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


class _SigtermFlag:
    """Notes a SIGTERM instead of dying of it, and passes it on to the handler that was there."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: Any = None
        # Only the main thread may set handlers; elsewhere SIGTERM keeps its meaning.
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.raised = True
        logger.warning("SIGTERM: the run saves a checkpoint after this step and stops.")
        if callable(self._previous):
            self._previous(number, frame)

    def uninstall(self) -> None:
        """Puts the earlier handler back."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in the order of the tree.

    Raises:
        ValueError: a leaf is not an array, or two leaves have the same dotted path.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"two arrays of the state have the path {name!r}; rename one of them.")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{name!r} is a {type(leaf).__name__}, and a checkpoint holds arrays; use jnp.asarray."
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(f"{name!r} is a typed key; store jax.random.key_data of it.")
        leaves[name] = leaf
    return leaves


def _restore_arguments(name: str, leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        raise ValueError(
            f"the template for {name!r} has no sharding; give jax.ShapeDtypeStruct(..., sharding=...)."
        )
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _from_first(value: int) -> int:
    """The value that process 0 has."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _all_true(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return bool(np.all(multihost_utils.process_allgather(np.int32(value))))
