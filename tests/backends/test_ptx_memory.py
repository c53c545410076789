"""The memory of the interpreter of PTX: bounds, alignment, and races in shared memory are found."""

from __future__ import annotations

import pytest
import torch
from ptx.bodies import STORE, execute, words
from ptx.parser import PtxError


def test_an_access_past_the_end():
    """A missing mask: 32 threads store in a tensor of 31 words."""
    body = "\tmov.u32 %r1, 0;" + STORE
    execute(body, torch.zeros(32, dtype=torch.int32))
    with pytest.raises(PtxError, match="4 bytes, 4 of them past the end of a tensor of 124 bytes"):
        execute(body, torch.zeros(32, dtype=torch.int32)[:31])
    with pytest.raises(PtxError, match="before all tensors"):
        execute("\tmov.u64 %rd1, 64;\n\tld.global.b32 %r1, [%rd1];", torch.zeros(4))


def test_a_vector_past_the_end():
    """A hint that is too wide: 16 bytes are read from a tensor of 4, as of an expanded one."""
    scalar = torch.zeros(64)[:1].expand(32)
    execute("\tld.global.b32 %r1, [%rd0];", scalar)
    with pytest.raises(PtxError, match="16 bytes, 12 of them past the end of a tensor of 4 bytes"):
        execute("\tld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0];", scalar)


def test_a_misaligned_vector():
    numbers = torch.zeros(64, dtype=torch.int32)
    for kind in ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0]", "st.global.v4.b32 [%rd0], {%r0, %r0, %r0, %r0}"):
        with pytest.raises(PtxError, match="misaligned: wanted a multiple of 16 bytes"):
            execute(f"\t{kind};", numbers[1:])
    execute("\tld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0];", numbers[4:])
    with pytest.raises(PtxError, match="in shared memory: wanted a multiple of 8 bytes"):
        execute("\tst.shared.b64 [smem+4], 0;", shared=64)


def test_a_store_of_two_numbers_at_one_address():
    execute("\tst.global.b32 [%rd0], 7;", torch.zeros(1))
    with pytest.raises(PtxError, match="two threads store different numbers at one address"):
        execute("\tst.global.b32 [%rd0], %r0;", torch.zeros(1))


def test_a_guard_masks_an_access():
    out = torch.zeros(20, dtype=torch.int32)
    execute("""
	mul.wide.u32 %rd8, %r0, 4;
	add.s64 %rd9, %rd0, %rd8;
	setp.lt.u32 %p1, %r0, 20;
	@%p1 st.global.b32 [%rd9], 3;
""", out)  # fmt: skip
    assert out.tolist() == [3] * 20


EXCHANGE = """
	shl.b32 %r2, %r0, 2;
	mov.u32 %r3, smem;
	add.u32 %r4, %r3, %r2;
	xor.b32 %r5, %r2, {distance};
	add.u32 %r5, %r3, %r5;
	mul.lo.u32 %r6, %r0, 3;
	st.shared.b32 [%r4], %r6;
	{first}
	ld.shared.b32 %r1, [%r5];
	{second}
	st.shared.b32 [%r4], %r0;
"""
BLOCK, WARP = "bar.sync 0;", "bar.warp.sync -1;"


@pytest.mark.parametrize(("distance", "barrier"), [(4, WARP), (4, BLOCK), (128, BLOCK)])
def test_an_exchange_in_shared_memory(distance, barrier):
    body = EXCHANGE.format(distance=distance, first=barrier, second=barrier)
    wanted = [3 * (thread ^ distance // 4) for thread in range(64)]
    assert words(body, threads=64, shared=256) == wanted


@pytest.mark.parametrize(
    ("distance", "first", "second", "what"),
    [
        (128, "", BLOCK, "reads what another one writes"),
        (128, WARP, BLOCK, "reads what another one writes"),
        (128, BLOCK, "", "writes what another one reads"),
        (128, BLOCK, WARP, "writes what another one reads"),
        (4, "", WARP, "reads what another one writes"),
        (4, WARP, "", "writes what another one reads"),
    ],
)
def test_a_missing_barrier(distance, first, second, what):
    with pytest.raises(PtxError, match=f"race in shared memory at byte .* {what}"):
        words(EXCHANGE.format(distance=distance, first=first, second=second), threads=64, shared=256)


def test_races_of_writes():
    execute("\tst.shared.b32 [smem], 7;", threads=64, shared=64)
    with pytest.raises(PtxError, match="writes what another one writes"):
        execute("\tst.shared.b32 [smem], %r0;", threads=64, shared=64)
    late = "\tsetp.eq.u32 %p1, %r0, {};\n\t@%p1 st.shared.b32 [smem], %r0;\n"
    execute(late.format(0) + "\tbar.sync 0;\n" + late.format(40), threads=64, shared=64)
    with pytest.raises(PtxError, match="thread 40 writes what another one writes"):
        execute(late.format(0) + late.format(40), threads=64, shared=64)


def test_copies_of_a_number_may_be_rounded_otherwise():
    """Lanes may write 1 and 1 + 2^-23 at once, as copies of a sum that each added up in its order; not 1 and 1.1."""
    body = "\tand.b32 %r2, %r0, 1;\n\tmad.lo.u32 %r3, %r2, {}, {};\n\tst.shared.b32 [smem], %r3;"
    execute(body.format(1, 0x3F800000), shared=64)
    for step, first in ((0x0CCCCD, 0x3F800000), (1, 0)):
        with pytest.raises(PtxError, match="writes what another one writes"):
            execute(body.format(step, first), shared=64)


def test_atomics_race_with_other_accesses_only():
    add = "\tatom.shared.add.u32 %r2, [smem], 1;\n"
    assert words(f"{add}{add}\tbar.sync 0;\n\tld.shared.b32 %r1, [smem];", threads=64, shared=64) == [128] * 64
    with pytest.raises(PtxError, match="reads what another one writes"):
        words(f"{add}\tld.shared.b32 %r1, [smem];", threads=64, shared=64)
    with pytest.raises(PtxError, match="an atomic instruction changes what another one uses"):
        words("\tst.shared.b32 [smem], 0;\n" + add, threads=64, shared=64)


def test_shared_memory_has_bounds():
    with pytest.raises(PtxError, match="4 bytes at address 252 in shared memory of 128 bytes"):
        words("\tshl.b32 %r2, %r0, 2;\n\tst.shared.b32 [%r2], %r0;", threads=64, shared=128)


def test_matrices():
    """A lane of ldmatrix holds two adjacent halves of a row, or of a column if transposed; stmatrix is its inverse."""
    fill = """
	shl.b32 %r2, %r0, 3;
	mul.lo.u32 %r3, %r0, 0x40004;
	add.u32 %r3, %r3, 0x10000;
	add.u32 %r4, %r3, 0x20002;
	st.shared.v2.b32 [%r2], {%r3, %r4};
	bar.sync 0;
	and.b32 %r5, %r0, 7;
	shl.b32 %r5, %r5, 4;
"""
    load = "\tldmatrix.sync.aligned.m8n8.x1{}.shared.b16 {{%r1}}, [%r5];\n"
    rows = [(2 * lane, 2 * lane + 1) for lane in range(32)]
    columns = [(lane % 4 * 16 + lane // 4, lane % 4 * 16 + 8 + lane // 4) for lane in range(32)]
    for modifier, wanted in (("", rows), (".trans", columns)):
        got = words(fill + load.format(modifier), shared=256)
        assert [(word & 0xFFFF, word >> 16) for word in got] == wanted
        back = fill + load.format(modifier) + "\tbar.sync 0;\n" + (
            f"\tstmatrix.sync.aligned.m8n8.x1{modifier}.shared.b16 [%r5], {{%r1}};\n\tbar.sync 0;\n" + load.format("")
        )  # fmt: skip
        assert words(back, shared=256) == [low | high << 16 for low, high in rows]
