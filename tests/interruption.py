"""Ctrl-C in the middle of a run that goes case by case."""

from __future__ import annotations

from calseg.runs import Progress


def stop_after(count: int) -> Progress:
    """Progress that interrupts the run when ``count`` cases are done."""

    def progress(stage: str, done: int, total: int, loss: float | None) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress
