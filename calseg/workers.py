"""Work that is shared out to processes, which end with the process that started them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from calseg.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")


def share_out(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Yield every item with its result, each as soon as it is done.

    The processes have equal shares of PyTorch's threads. When the generator is closed, or an error or Ctrl-C ends it,
    they stop within the item that they are at. They also stop when this process is killed.

    Args:
        function: function of a module, or a ``functools.partial`` of one. Errors that it raises are raised here.
        items: what it is called with. Items and results are pickled.
        workers: number of processes. With 1, the function is called in this process.

    Raises:
        RunError: a process was killed, as it is where memory runs out.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            yield item, function(item)
        return
    context = get_context("spawn")  # a forked process could not use PyTorch's threads
    watched, held = context.Pipe(duplex=False)  # ``held`` is closed when the work ends, or this process
    pool = ProcessPoolExecutor(workers, context, _begin, (watched, max(1, torch.get_num_threads() // workers)))
    try:
        with _interrupts_held():
            waiting = {pool.submit(function, item): item for item in items}
        for future in as_completed(waiting):
            yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RunError("a process of --workers was killed, perhaps for want of memory; give fewer") from error
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        watched.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block. Processes that begin in it never get it, as they inherit this."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(watched: Connection, threads: int) -> None:
    """Set up a process. A terminal sends Ctrl-C to all processes, but only the first may act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    """End this process when the other end of a pipe, through which nothing is sent, is closed."""
    with suppress(EOFError, OSError):
        watched.recv_bytes()
    os._exit(1)
