"""Saves without stopping: tensors are copied to CPU memory, a thread writes them, and the ranks agree later that all is there.

    step k          all ranks copy their share, and go on; each has a thread that writes its files, and tells nobody
    step k+1, ...   the message in which ranks tell each step whether to stop also says who still writes
    nobody writes   they exchange what they wrote; rank 0 writes indices and manifest and renames the folder

So no thread ever uses a process group. One save is under way at a time. When a writer failed on any rank, the run fails on
all ranks at the step that learns of it, and the checkpoints before are as they were.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from megatrain.checkpoint import retention, writer
from megatrain.checkpoint.manifest import LEFTOVERS, TEMPORARY
from megatrain.checkpoint.snapshot import CheckpointShard, take_shard
from megatrain.checkpoint.train_state import TrainState
from megatrain.checkpoint.writer import WrittenShard
from megatrain.config.loader import Config
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig
from megatrain.optim.zero import ZeroOptimizer

Describe = Callable[[Path], None]
"""Writes what goes with a checkpoint's tensors: model config, tokenizer."""


class SaveResult(NamedTuple):
    """A checkpoint that is there; how long training stood still for it, and how long its writing took beside training."""

    path: Path
    stalled: float
    seconds: float


class Checkpointer:
    """The checkpoints of a run. All ranks call its methods together and in the same order.

    Attributes:
        stalled: seconds that training has stood still for saves since this was last set to 0.
    """

    def __init__(
        self,
        folder: Path,
        *,
        zero: ZeroOptimizer,
        config: Config,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        describe: Describe,
    ) -> None:
        self.folder, self.stalled = folder, 0.0
        self._zero, self._config, self._architecture, self._mesh, self._describe = (
            zero,
            config,
            architecture,
            mesh,
            describe,
        )
        self._writing: _Writing | None = None
        self._deleting: threading.Thread | None = None
        if mesh.rank == 0:
            self._clear()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._writing is not None and self._writing.thread.is_alive()

    def save(
        self, progress: TrainState, *, prune: bool = True, back_to: int | None = None
    ) -> SaveResult | None:
        """Begin to save; returns the checkpoint before, where that had to be waited for.

        `prune` lets older ones go once it is there, but for the newest of at most step `back_to`, which the run may have to go back to.
        """
        before = self.finish()
        started = time.perf_counter()
        final = self.folder / f"step-{progress.step:08d}"
        temporary = self.folder / f"{TEMPORARY}{final.name}"
        self._together(lambda: self._prepare(temporary))
        content = take_shard(self._zero, self._mesh)
        needed = sum(self._together(lambda: content.nbytes))
        self._together(lambda: _check_space(self.folder, needed), cleanup=temporary)
        self._writing = _Writing(
            lambda: self._write(temporary, content, progress), final, temporary, prune, back_to
        )
        self._writing.stalled = time.perf_counter() - started
        self.stalled += self._writing.stalled
        return before

    def proceed(self, *, anyone_writes: bool) -> SaveResult | None:
        """Publish what all ranks have written; `anyone_writes` is the same on all ranks."""
        writing = self._writing
        if writing is None or anyone_writes:
            return None
        started = time.perf_counter()
        self._writing = None
        writing.thread.join()
        shares: list[WrittenShard] = self._together(writing.result, cleanup=writing.temporary)
        self._together(lambda: self._commit(writing, shares), cleanup=writing.temporary)
        stalled = time.perf_counter() - started
        self.stalled += stalled
        return SaveResult(writing.final, writing.stalled + stalled, writing.seconds)

    def finish(self) -> SaveResult | None:
        """Wait for the save that is under way and publish it."""
        started = time.perf_counter()
        if self._writing is not None:
            self._writing.thread.join()
        waited = time.perf_counter() - started
        self.stalled += waited
        saved = self.proceed(anyone_writes=False)
        if self._deleting is not None:
            self._deleting.join()
        return None if saved is None else saved._replace(stalled=saved.stalled + waited)

    def _clear(self) -> None:
        """Delete what a killed run left half written or half deleted."""
        for left in [path for prefix in LEFTOVERS for path in self.folder.glob(f"{prefix}*")]:
            shutil.rmtree(left, ignore_errors=True)

    def _prepare(self, temporary: Path) -> None:
        if self._mesh.rank == 0:
            writer.prepare(temporary)

    def _write(
        self, temporary: Path, content: CheckpointShard, progress: TrainState
    ) -> WrittenShard:
        if self._mesh.rank == 0:
            self._describe(temporary)
            writer.write_train_state(
                temporary,
                progress,
                config=self._config,
                architecture=self._architecture,
                mesh=self._mesh,
            )
        return writer.write_shard(
            temporary, content, rank=self._mesh.rank, stage=self._mesh.pipeline.rank
        )

    def _commit(self, writing: _Writing, shares: list[WrittenShard]) -> None:
        if self._mesh.rank == 0:
            writer.commit(
                writing.temporary,
                writing.final,
                shares,
                states=self._zero.states,
                config=self._config,
                architecture=self._architecture,
            )
        if self._mesh.rank == 0 and writing.prune:
            checkpoint = self._config.checkpoint
            old = retention.find_deletable(
                self.folder,
                keep_last=checkpoint.keep_last,
                keep_every=checkpoint.keep_every,
                best=retention.find_best(self.folder.parent),
                rollback_step=writing.back_to,
                current_step=retention.step_number(writing.final),
            )
            self._deleting = threading.Thread(target=retention.delete, args=(old,), daemon=True)
            self._deleting.start()

    def _together(self, work: Callable[[], Any], *, cleanup: Path | None = None) -> list[Any]:
        """Do the rank's work; when it failed on any rank, raise the first failure on all. Returns all ranks' results."""
        try:
            outcome: tuple[Any, str | None] = (work(), None)
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
            raise CheckpointError(f"{failure}; the checkpoints before it are as they were")
        return [result for result, _ in outcomes]


class _Writing:
    """A thread's work, its result or what it raised."""

    def __init__(
        self,
        work: Callable[[], WrittenShard],
        final: Path,
        temporary: Path,
        prune: bool,
        back_to: int | None,
    ) -> None:
        self.final, self.temporary, self.prune, self.back_to = final, temporary, prune, back_to
        self.stalled, self.seconds = 0.0, 0.0
        self._share: WrittenShard | None = None
        self._error: Exception | None = None
        self.thread = threading.Thread(
            target=self._run, args=(work,), name="checkpoint", daemon=True
        )
        self.thread.start()

    def _run(self, work: Callable[[], WrittenShard]) -> None:
        started = time.perf_counter()
        try:
            self._share = work()
        except Exception as error:  # raised again where the ranks agree on the outcome
            self._error = error
        self.seconds = time.perf_counter() - started

    def result(self) -> WrittenShard:
        if self._error is not None:
            raise self._error
        assert self._share is not None
        return self._share


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"it takes {needed / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free (No space left on device)"
        )
