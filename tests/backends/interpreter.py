"""Changes that make Triton's interpreter (TRITON_INTERPRET=1) fit for tests: ``install()`` before a kernel runs.

- It patches ``triton.language`` at every call of a device function, which takes most of its time. Here it does so once.
- It copies the whole storage of every tensor to the host and back. Here tensors are on the host already.
- It truncates float32 to bfloat16. Here it rounds to the nearest, as a GPU does.
- In Triton 3.6 it makes an int of an array of one element, which NumPy 2.4 refuses. Here it asks for the item.
- NumPy warns of every NaN and overflow, which a GPU does not. Here it is quiet.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Patched:
    def restore(self) -> None:
        """Do nothing, so that the patches stay."""


def install() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    patch, run, cast = interpreter._patch_lang, executor.__call__, builder.cast_impl
    done = []

    def patch_once(_):
        if not done:  # both modules that device functions name: the kernels' tl, and the core of Triton's own
            done.append(patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
            tl.tensor.__index__ = lambda self: self.handle.data.item()
        return _Patched()

    def run_quietly(self, *args, **kwargs):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run(self, *args, **kwargs)

    def cast_rounding(self, source, to):
        given, wanted = source.dtype.scalar, to.scalar
        if given == tl.bfloat16 and wanted == tl.float32:
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), wanted)
        if given == tl.float32 and wanted == tl.bfloat16:
            bits = source.data.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            kept = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded)
            return interpreter.TensorHandle(kept.astype(np.uint16), wanted)
        return cast(self, source, to)

    interpreter._patch_lang = patch_once
    executor.__call__ = run_quietly
    executor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    executor._restore_args_dev = lambda self, *_: None
    builder.cast_impl = builder.create_fp_ext = builder.create_fp_trunc = cast_rounding


def run_program(kernel: Any, programs: int, program: int, arguments: Sequence[Any], num_warps: int) -> None:
    """Run one program of a launch. Here a program has no warps."""
    executor = interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, (1,))
    given = inspect.getcallargs(executor.fn, *arguments)
    given = {k: v if k in executor.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
    interpreter._patch_lang(executor.fn)
    interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
    interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
    with np.errstate(all="ignore"):
        executor.fn(**given)
