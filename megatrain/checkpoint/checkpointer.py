"""Saves checkpoints in the background while training continues.

    step k          all ranks copy their tensors to CPU memory; a thread on each writes its files
    step k+1, ...   the message in which ranks agree whether to stop also says who still writes
    all are done    they exchange what they wrote; rank 0 writes indices and manifest and renames

No thread uses a process group. At most one save is in progress. If a writer failed on any rank, the
run fails on all ranks at the step that learns of it; earlier checkpoints are not affected.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from megatrain.checkpoint import retention, writer
from megatrain.checkpoint.manifest import LEFTOVERS, TEMPORARY
from megatrain.checkpoint.snapshot import CheckpointShard, take_shard
from megatrain.checkpoint.train_state import RunDescription, TrainState, write_train_state
from megatrain.checkpoint.writer import WrittenShard
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import CheckpointError
from megatrain.optim.zero import ZeroOptimizer


class SaveResult(NamedTuple):
    """A complete checkpoint.

    Attributes:
        path: its folder.
        stalled: seconds that training was blocked.
        seconds: seconds that this rank's thread wrote.
    """

    path: Path
    stalled: float
    seconds: float


class Checkpointer:
    """Saves the checkpoints of a run. All ranks call its methods together, in the same order.

    Args:
        folder: the folder of the run's checkpoints.
        optimizer: this rank's optimizer and stage.
        mesh: the process mesh.
        run: the constant part of `train_state.json`.
        keep_last: newest checkpoints to keep; 0 keeps all.
        keep_every: also keep multiples of this step; 0 for none.
        adapter_config: content of `adapter_config.json` for a LoRA run.
        write_metadata: writes model config and tokenizer into a checkpoint's folder.

    Attributes:
        stalled: seconds that saves have blocked training since the caller last set it to 0.
    """

    def __init__(
        self,
        folder: Path,
        *,
        optimizer: ZeroOptimizer,
        mesh: ProcessMesh,
        run: RunDescription,
        keep_last: int,
        keep_every: int,
        adapter_config: Mapping[str, Any] | None,
        write_metadata: Callable[[Path], None],
    ) -> None:
        self.folder = folder
        self.stalled = 0.0
        self._optimizer = optimizer
        self._mesh = mesh
        self._run = run
        self._keep_last, self._keep_every = keep_last, keep_every
        self._adapter_config = adapter_config
        self._write_metadata = write_metadata
        self._writing: _Writing | None = None
        self._deleting: threading.Thread | None = None
        if mesh.rank == 0:
            self._delete_leftovers()

    @property
    def is_writing(self) -> bool:
        """True while this rank's thread writes."""
        return self._writing is not None and self._writing.thread.is_alive()

    def save(
        self, state: TrainState, *, prune: bool = True, rollback_step: int | None = None
    ) -> SaveResult | None:
        """Starts to save; returns the previous checkpoint if it was still being written.

        Args:
            state: the run's state.
            prune: delete older checkpoints once this one is complete.
            rollback_step: keep the newest complete checkpoint at or before this step.

        Raises:
            CheckpointError: a rank could not prepare its files, or the disk is too small.
        """
        previous = self.finish()
        started = time.perf_counter()
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f"{TEMPORARY}{final.name}"
        self._on_all_ranks(lambda: self._prepare(temporary))
        shard = take_shard(self._optimizer, self._mesh)
        needed = sum(self._on_all_ranks(lambda: shard.nbytes))
        self._on_all_ranks(lambda: _check_space(self.folder, needed), cleanup=temporary)
        self._writing = _Writing(
            lambda: self._write(temporary, shard, state), final, temporary, prune, rollback_step
        )
        self._writing.stalled = time.perf_counter() - started
        self.stalled += self._writing.stalled
        return previous

    def proceed(self, *, anyone_writes: bool) -> SaveResult | None:
        """Publishes the checkpoint if all ranks have written; `anyone_writes` is global."""
        writing = self._writing
        if writing is None or anyone_writes:
            return None
        started = time.perf_counter()
        self._writing = None
        writing.thread.join()
        shards: list[WrittenShard] = self._on_all_ranks(writing.result, cleanup=writing.temporary)
        self._on_all_ranks(lambda: self._commit(writing, shards), cleanup=writing.temporary)
        stalled = time.perf_counter() - started
        self.stalled += stalled
        return SaveResult(writing.final, writing.stalled + stalled, writing.seconds)

    def finish(self) -> SaveResult | None:
        """Waits for the save in progress and publishes it."""
        started = time.perf_counter()
        if self._writing is not None:
            self._writing.thread.join()
        waited = time.perf_counter() - started
        self.stalled += waited
        saved = self.proceed(anyone_writes=False)
        if self._deleting is not None:
            self._deleting.join()
        return None if saved is None else saved._replace(stalled=saved.stalled + waited)

    def _delete_leftovers(self) -> None:
        """Deletes folders that a killed run was writing or deleting."""
        for path in [path for prefix in LEFTOVERS for path in self.folder.glob(f"{prefix}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _prepare(self, temporary: Path) -> None:
        if self._mesh.rank == 0:
            writer.prepare(temporary)

    def _write(self, temporary: Path, shard: CheckpointShard, state: TrainState) -> WrittenShard:
        if self._mesh.rank == 0:
            self._write_metadata(temporary)
            write_train_state(temporary, state, self._run)
        return writer.write_shard(
            temporary, shard, rank=self._mesh.rank, stage=self._mesh.pipeline.rank
        )

    def _commit(self, writing: _Writing, shards: list[WrittenShard]) -> None:
        if self._mesh.rank != 0:
            return
        writer.commit(
            writing.temporary,
            writing.final,
            shards,
            states=self._optimizer.state.names,
            adapter_config=self._adapter_config,
        )
        if writing.prune:
            old = retention.find_deletable(
                self.folder,
                keep_last=self._keep_last,
                keep_every=self._keep_every,
                best=retention.find_best(self.folder.parent),
                rollback_step=writing.rollback_step,
                current_step=retention.step_number(writing.final),
            )
            self._deleting = threading.Thread(target=retention.delete, args=(old,), daemon=True)
            self._deleting.start()

    def _on_all_ranks(self, work: Callable[[], Any], *, cleanup: Path | None = None) -> list[Any]:
        """Runs `work` and returns the results of all ranks.

        If it failed on any rank, raises the first failure on all of them.
        """
        outcome: tuple[Any, str | None]
        try:
            outcome = (work(), None)
        except (
            OSError,
            RuntimeError,
            ValueError,
            MemoryError,
            SafetensorError,
            CheckpointError,
        ) as error:
            outcome = (None, f"rank {self._mesh.rank} could not write the checkpoint: {error}")
        outcomes = gather_objects(outcome, self._mesh.world)
        failure = next((text for _, text in outcomes if text), None)
        if failure is not None:
            if cleanup is not None and self._mesh.rank == 0:
                shutil.rmtree(cleanup, ignore_errors=True)
            raise CheckpointError(f"{failure}; earlier checkpoints are not affected")
        return [result for result, _ in outcomes]


class _Writing:
    """A save in progress: its thread, and the result or the error."""

    def __init__(
        self,
        work: Callable[[], WrittenShard],
        final: Path,
        temporary: Path,
        prune: bool,
        rollback_step: int | None,
    ) -> None:
        self.final, self.temporary = final, temporary
        self.prune, self.rollback_step = prune, rollback_step
        self.stalled, self.seconds = 0.0, 0.0
        self._shard: WrittenShard | None = None
        self._error: Exception | None = None
        self.thread = threading.Thread(
            target=self._run, args=(work,), name="checkpoint", daemon=True
        )
        self.thread.start()

    def _run(self, work: Callable[[], WrittenShard]) -> None:
        started = time.perf_counter()
        try:
            self._shard = work()
        except Exception as error:  # raised again by `result`, where the ranks agree
            self._error = error
        self.seconds = time.perf_counter() - started

    def result(self) -> WrittenShard:
        if self._error is not None:
            raise self._error
        assert self._shard is not None
        return self._shard


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e6:,.1f} MB free and {needed / 1e6:,.1f} MB are needed "
            "(No space left on device)"
        )
