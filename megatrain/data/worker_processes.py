"""Processing of blocks of records in many processes, in order.

Processes, not the threads of the tokenizers library: threads share one cache, and the interpreter
lock while token ids become numbers. At most two blocks per worker are in flight.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from megatrain.data.records import TextBlock
from megatrain.errors import DataError

Spec = TypeVar("Spec")
Result = TypeVar("Result")


def map_blocks(
    blocks: Iterable[TextBlock],
    make: Callable[[Spec], Callable[[TextBlock], Result]],
    spec: Spec,
    *,
    workers: int,
) -> Iterator[Result]:
    """Yields `make(spec)(block)` of each block in order; `make` is called once in each process.

    One worker means this process.

    Raises:
        DataError: a worker process was killed.
    """
    if workers == 1:
        with _single_threaded():
            yield from map(make(spec), blocks)
    else:
        yield from map_in_processes(blocks, make, spec, workers=workers)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Stops the tokenizers library from starting a thread per core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def map_in_processes(
    blocks: Iterable[TextBlock],
    make: Callable[[Spec], Callable[[TextBlock], Result]],
    spec: Spec,
    *,
    workers: int,
) -> Iterator[Result]:
    """Yields the same as `map_blocks`, always from other processes."""
    from multiprocessing import get_context

    # Spawned, because a fork copies the threads and locks of this process.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(make, spec)
    )
    in_flight: deque[Future[Result]] = deque()
    try:
        for block in blocks:
            in_flight.append(pool.submit(_process, block))
            if len(in_flight) == 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, probably for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encode: Callable[[TextBlock], Any] | None = None  # set at the start of a worker process


def _start_worker(make: Callable[[Any], Callable[[TextBlock], Any]], spec: Any) -> None:
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _encode
    _encode = make(spec)


def _exit_with_parent() -> None:
    """Exits this process when the parent is killed, instead of waiting for blocks endlessly."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _process(block: TextBlock) -> Any:
    assert _encode is not None
    return _encode(block)
