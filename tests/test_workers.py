"""Tests of work that is shared out to processes: results, errors, and that no process outlives its work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from calseg.errors import RunError
from calseg.workers import share_out

TESTS = Path(__file__).parent


def double(item: int) -> tuple[int, int, int]:
    return 2 * item, os.getpid(), torch.get_num_threads()


def fail_at_two(item: int) -> int:
    if item == 2:
        raise RunError("two is wrong")
    return item


def die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def sleep(item: int, folder: Path) -> int:
    """Item 0 is done at once; the others say that they have begun, and do not end."""
    if item:
        (folder / str(os.getpid())).touch()
        time.sleep(1000)
    return item


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait; the time limit of the test ends what never comes."""
    while not condition():
        time.sleep(0.02)


def test_every_item_has_its_result(set_threads: Callable[[int], None]) -> None:
    set_threads(4)
    alone, shared = (dict(share_out(double, range(6), workers)) for workers in (1, 2))
    assert {item: result[0] for item, result in shared.items()} == {item: 2 * item for item in range(6)}
    assert [result[:2] for result in alone.values()] == [(2 * item, os.getpid()) for item in range(6)]
    assert os.getpid() not in {result[1] for result in shared.values()}
    assert {result[2] for result in shared.values()} == {2}
    assert not multiprocessing.active_children()


def test_errors_come_through() -> None:
    with pytest.raises(RunError, match=r"^two is wrong$"):
        list(share_out(fail_at_two, range(4), 2))
    with pytest.raises(RunError, match="a process of --workers was killed"):
        list(share_out(die, range(4), 2))
    assert not multiprocessing.active_children()


def test_a_process_stops_within_its_item(tmp_path: Path) -> None:
    results = share_out(partial(sleep, folder=tmp_path), range(3), 2)
    assert next(results) == (0, 0)
    wait_for(lambda: bool(list(tmp_path.iterdir())))
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs kill")
def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from functools import partial
from pathlib import Path
from test_workers import sleep
from calseg.workers import share_out
list(share_out(partial(sleep, folder=Path({str(tmp_path)!r})), (1, 2), 2))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=TESTS.parent) as parent:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2 or parent.poll() is not None)
        parent.kill()
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 2
    wait_for(lambda: not any(is_running(process) for process in processes))


def is_running(process: int) -> bool:
    """Whether a process runs. One that has ended, and that nobody has waited for, does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
