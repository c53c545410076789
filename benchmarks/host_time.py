"""Time of the host in a call of the Triton backend, without a GPU: ``python benchmarks/host_time.py``.

Triton's real launcher runs over a driver that only records (``tests/recorder``), on CPU tensors of 64 x 64 voxels and
4 classes. So a time is that of Python, autograd, the backend and the launcher, forward and backward. It stands beside
those of ``F.cross_entropy``, and of nnU-Net's Dice + cross-entropy in PyTorch, for four voxels on the CPU: dispatch and
next to no arithmetic. In each of many short rounds, every call is timed once. A ratio is that of the least times, which
other work on the machine changes least.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import eager
import torch
import torch.nn.functional as F
from torch import Tensor

import calseg

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from recorder import driver

ROUNDS, CALLS, WARM_UP = 400, 5, 25
PEER, PEER_OF_DICE = "F.cross_entropy", "nnU-Net's Dice + CE"
Step = Callable[[], None]


def step_of(loss: Callable[..., Tensor], *leaves: Tensor) -> Step:
    """Return a training step: drop the gradients, forward, backward."""
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return step


def steps() -> dict[str, Step]:
    """Return the steps that are timed, by name."""
    shape = (1, 4, 64, 64)
    x, mu, logvar = (torch.randn(shape) for _ in range(3))
    soft = torch.softmax(torch.randn(shape), 1)
    target = torch.randint(0, 4, (1, 64, 64))
    few, few_target = torch.randn(1, 4, 2, 2), torch.randint(0, 4, (1, 2, 2))
    gaussian = lambda x, mu, logvar: calseg.vls_cross_entropy(x, target, mu=mu, logvar=logvar, backend="triton")  # noqa: E731
    return {
        PEER: step_of(lambda x: F.cross_entropy(x, few_target), few),
        PEER_OF_DICE: step_of(lambda x: eager.dice_cross_entropy(x, few_target), few.clone()),
        "cross-entropy": step_of(lambda x: calseg.vls_cross_entropy(x, target, backend="triton"), x.clone()),
        "soft cross-entropy": step_of(lambda x: calseg.soft_cross_entropy(x, soft, backend="triton"), x.clone()),
        "VLS, 4 samples": step_of(gaussian, x.clone(), mu, logvar),
        "Dice + cross-entropy": step_of(
            lambda x: calseg.vls_dice_cross_entropy(x, target, backend="triton"), x.clone()
        ),
    }


def measure() -> None:
    """Time all steps, and print a table."""
    recorder = driver.Recorder()
    torch.set_num_threads(1)
    timed, launches, seconds = steps(), {}, {}
    for name, step in timed.items():
        for _ in range(WARM_UP):  # compile, too
            step()
        before = recorder.launches
        step()
        launches[name], seconds[name] = recorder.launches - before, []
    for _ in range(ROUNDS):
        for name, step in timed.items():
            start = perf_counter()
            for _ in range(CALLS):
                step()
            seconds[name].append((perf_counter() - start) / CALLS)
    print(f"{'forward + backward':24}{'launches':>9}{'us':>9}{'least':>9}{'/ ' + PEER:>19}")
    for name, of_step in seconds.items():
        ratio = min(of_step) / min(seconds[PEER])
        median, least = 1e6 * statistics.median(of_step), 1e6 * min(of_step)
        print(f"{name:24}{launches[name]:9}{median:9.1f}{least:9.1f}{ratio:19.2f}")


def main() -> None:
    """Build the driver, and measure in a process that uses it."""
    if driver.compiler() is None:
        sys.exit("host_time.py: wanted gcc on Linux, to build a CUDA driver that records")
    with tempfile.TemporaryDirectory() as folder:
        driver.build(Path(folder))
        command = [sys.executable, __file__, "--inside"]
        sys.exit(subprocess.run(command, env=driver.environment(Path(folder)), check=False).returncode)


if __name__ == "__main__":
    measure() if "--inside" in sys.argv else main()
