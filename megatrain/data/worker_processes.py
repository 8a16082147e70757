"""Work on blocks of records in many processes, in order.

A process each, and not the tokenizers library's own threads: threads share one cache and one interpreter lock, under
which ids become numbers again. Two blocks a worker are under way.
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

Recipe = TypeVar("Recipe")
Result = TypeVar("Result")


def map_blocks(
    blocks: Iterable[TextBlock],
    make: Callable[[Recipe], Callable[[TextBlock], Result]],
    recipe: Recipe,
    *,
    workers: int,
) -> Iterator[Result]:
    """Yield `make(recipe)(block)` of each block in order; `make` runs once in each process. With 1 worker all runs here."""
    if workers == 1:
        with _one_thread():
            yield from map(make(recipe), blocks)
    else:
        yield from map_in_processes(blocks, make, recipe, workers=workers)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizers library from starting a thread for each core."""
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
    make: Callable[[Recipe], Callable[[TextBlock], Result]],
    recipe: Recipe,
    *,
    workers: int,
) -> Iterator[Result]:
    """As `map_blocks`, in processes of their own."""
    from multiprocessing import get_context

    # Spawned, not forked: a fork would copy whatever threads and locks this process already has.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(make, recipe)
    )
    under_way: deque[Future[Result]] = deque()
    try:
        for block in blocks:
            under_way.append(pool.submit(_work_on, block))
            if len(under_way) == 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most likely for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[TextBlock], Any] | None = None  # in a worker process only: set as it starts


def _start_worker(make: Callable[[Any], Callable[[TextBlock], Any]], recipe: Any) -> None:
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _work
    _work = make(recipe)


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for its next block for ever."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_on(block: TextBlock) -> Any:
    assert _work is not None
    return _work(block)
