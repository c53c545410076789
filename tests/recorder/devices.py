"""Launches on several devices and streams with the recording driver: prints a JSON object.

Run in the environment of :func:`recorder.driver.environment`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from calseg.kernels import launch, reductions
from calseg.kernels.scale_gradients import BLOCK_SIZE, scale_gradients

from calseg.backends import triton as engine
from calseg.operations import Labels, LossSpec, LossTensors
from recorder.driver import Recorder


def on_device(recorder: Recorder, index: int) -> dict[str, Any]:
    """Launch a kernel for a tensor of a device, while device 0 is the current one."""
    like = SimpleNamespace(device=torch.device("cuda", index), get_device=lambda: index, is_cuda=True)
    gradient, factor = torch.ones(8), torch.ones(())
    arguments = (gradient, None, None, factor, None, 0, 8, BLOCK_SIZE)
    launch.launch_kernel(scale_gradients, 1, like, arguments, 8)
    return {"device": index, "function": recorder.last(0).function, "current_after": recorder.device}


def on_stream(recorder: Recorder, stream: int) -> dict[str, int]:
    """Compute a mean on a stream. Its launch says on which stream it is, and where its counter is."""
    recorder.stream = stream
    x, target = torch.randn(1, 4, 64), torch.zeros(1, 64, dtype=torch.uint8)
    spec = LossSpec("cross_entropy", Labels(target, 255), None, "mean", x.dtype)
    engine.loss_and_corrections(spec, LossTensors(x), LossTensors(torch.empty_like(x)))
    last, counter = recorder.last(0), reductions.counter_of(x)
    return {"stream": stream, "launched_on": last.stream, "function": last.function, "counter": counter.data_ptr()}


def main() -> None:
    """Let two devices and two streams take turns, and count how often Triton looks for a kernel."""
    recorder, entered = Recorder(), []
    searches, search = [], triton.JITFunction.run

    @contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        before, recorder.device = recorder.device, index
        yield
        recorder.device = before

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        searches.append(self.fn.__name__)
        return search(self, *arguments, **options)

    triton.JITFunction.run = counted
    torch.cuda.current_device = lambda: recorder.device
    torch.cuda.device = device
    devices = [on_device(recorder, index) for index in (0, 1, 0, 1)]
    on_devices = len(searches)
    launch.stream_of = lambda like: recorder.stream
    streams = [on_stream(recorder, stream) for stream in (5, 6, 5, 6)]
    print(
        json.dumps({
            "entered": entered, "devices": devices, "streams": streams, "searches_on_devices": on_devices,
            "searches_on_streams": len(searches) - on_devices,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
