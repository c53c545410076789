"""A CUDA driver that only records, for Triton's real launcher on CPU tensors.

``build`` compiles it, ``environment`` is that of a process that uses it, and ``Recorder`` is used in that process.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("libcuda.c")
ARCHITECTURE = 90


def compiler() -> str | None:
    """Return the C compiler, or None where the driver cannot be built."""
    return shutil.which("gcc") if sys.platform == "linux" else None


def build(folder: Path) -> None:
    """Compile the driver into a folder."""
    command = [compiler() or "gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(SOURCE)]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose CUDA driver is the one in a folder, and that imports from the tests."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = SOURCE.parents[1]
    for name, folders in (("LD_LIBRARY_PATH", [folder]), ("PYTHONPATH", [tests, tests / "backends"])):
        kept[name] = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])
    return {**kept, "TRITON_LIBCUDA_PATH": str(folder)}


class Launch(NamedTuple):
    """A launch as the driver got it."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    function: int
    stream: int
    parameters: bytes


class Recorder:
    """The driver of this process. It makes itself the driver of Triton, and the Triton backend take CPU tensors.

    ``device`` and ``stream`` are the current ones, as numbers.
    """

    def __init__(self) -> None:
        import triton
        from ptx.compilation import without_machine_code
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

        recorder = self
        self.device = self.stream = 0

        class Driver(CudaDriver):
            def __init__(self) -> None:
                self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
                self.get_device_capability = lambda device: (ARCHITECTURE // 10, ARCHITECTURE % 10)
                self.get_current_stream = lambda device: recorder.stream
                self.get_current_device = lambda: recorder.device
                self.set_current_device = lambda device: None

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", ARCHITECTURE, 32)

        without_machine_code()
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.num_launches.restype = ctypes.c_int64
        triton.runtime.driver.set_active(Driver())

    @property
    def launches(self) -> int:
        """The number of launches so far."""
        return int(self._library.num_launches())

    def expect(self, sizes: list[int]) -> None:
        """Say how many bytes each parameter of the next launch has."""
        self._library.expect_parameters(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def last(self, num_bytes: int) -> Launch:
        """Return the last launch, with the first bytes of its parameters."""
        shape, parameters = (ctypes.c_uint * 7)(), (ctypes.c_ubyte * 4096)()
        function, stream = ctypes.c_uint64(), ctypes.c_uint64()
        self._library.last_launch(shape, parameters, ctypes.byref(function), ctypes.byref(stream))
        numbers: list[Any] = list(shape)
        return Launch(
            tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], function.value, stream.value,
            bytes(parameters[:num_bytes]),
        )  # fmt: skip
