"""Small kernels for the tests of the interpreter."""

from __future__ import annotations

import struct

import torch

from ptx.execution import run, span_of

HEADER = """.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry test({parameters})
.reqntid {threads}
{{
	.reg .pred %p<8>;
	.reg .b16 %rs<16>;
	.reg .b32 %r<32>;
	.reg .f32 %f<8>;
	.reg .b64 %rd<16>;
{body}
	ret;
}}
"""


def execute(
    body: str, *tensors: torch.Tensor, threads: int = 32, programs: int = 1, shared: int = 0, error: float = 0.0
):
    """Run a body whose registers ``%rd0``, ``%rd1``, ... are the addresses of tensors, and ``%r0`` is the thread."""
    parameters = ",".join(f"\n\t.param .u64 p{i}" for i in range(len(tensors)))
    loads = "".join(f"\tld.param.u64 %rd{i}, [p{i}];\n" for i in range(len(tensors)))
    text = HEADER.format(parameters=parameters, threads=threads, body=f"{loads}\tmov.u32 %r0, %tid.x;\n{body}")
    addresses = b"".join(struct.pack("<Q", tensor.data_ptr()) for tensor in tensors)
    run(text, addresses, programs, [span_of(t) for t in tensors], shared_bytes=shared, error=error)


STORE = """
	mul.wide.u32 %rd8, %r0, 4;
	add.s64 %rd9, %rd0, %rd8;
	st.global.b32 [%rd9], %r1;
"""
"""The end of a body: each thread stores ``%r1``."""


def words(body: str, threads: int = 32, **options: int) -> list[int]:
    """Return ``%r1`` of every thread at the end of a body."""
    out = torch.zeros(threads, dtype=torch.int32)
    execute(body + STORE, out, threads=threads, **options)
    return [word & 0xFFFFFFFF for word in out.tolist()]
