"""The interpreter of PTX itself: its instructions, the order of threads, and the faults that it must find."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from ptx.execution import run, span_of
from ptx.parser import PtxError, parse

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


# ---- instructions ----


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("shf.l.wrap.b32 %r1, 0x80000001, 0x12345678, 36", 0x23456788),
        ("shf.r.clamp.b32 %r1, 0x80000001, 0x12345678, 40", 0x12345678),
        ("prmt.b32 %r1, 0x44332211, 0x88776655, 0x7c50", 0x88FF6611 & 0xFF00FFFF),
        ("bfe.u32 %r1, 0xABCD1234, 8, 12", 0xD12),
        ("bfe.s32 %r1, 0xABCD1234, 8, 12", 0xFFFFFD12),
        ("bfe.s32 %r1, 0xABCD1234, 24, 20", 0xFFFFFFAB),
        ("bfi.b32 %r1, 0xFF, 0x12345678, 4, 8", 0x12345FF8),
        ("brev.b32 %r1, 0x00000012", 0x48000000),
        ("bfind.u32 %r1, 0x00F00000", 23),
        ("bfind.shiftamt.u32 %r1, 0x00F00000", 8),
        ("bfind.s32 %r1, -1", 0xFFFFFFFF),
        ("bfind.s32 %r1, -9", 3),
        ("clz.b32 %r1, 0x00F00000", 8),
        ("clz.b32 %r1, 0", 32),
        ("popc.b32 %r1, 0xF0F00001", 9),
        ("lop3.b32 %r1, 0xF0, 0xCC, 0xAA, 0x96", 0xF0 ^ 0xCC ^ 0xAA),
        ("div.s32 %r1, -7, 2", -3 & 0xFFFFFFFF),
        ("rem.s32 %r1, -7, 2", -1 & 0xFFFFFFFF),
        ("mul.hi.u32 %r1, 0xD2511F53, 0x9E3779B9", 0xD2511F53 * 0x9E3779B9 >> 32),
        ("mul.hi.s32 %r1, -3, 5", 0xFFFFFFFF),
        ("mad.lo.s32 %r1, 65537, 65537, -1", 65537**2 - 1 & 0xFFFFFFFF),
        ("shl.b32 %r1, 1, 32", 0),
        ("shr.u32 %r1, 0x80000000, 40", 0),
        ("shr.s32 %r1, 0x80000000, 40", 0xFFFFFFFF),
        ("cvt.rzi.s32.f32 %r1, 0f7F800000", 0x7FFFFFFF),
        ("cvt.rzi.u32.f32 %r1, 0fC0000000", 0),
        ("cvt.rzi.s32.f32 %r1, 0f7FC00000", 0),
        ("cvt.rni.s32.f32 %r1, 0f40200000", 2),
        ("cvt.rn.bf16x2.f32 %r1, 0f3F808001, 0f3F808000", 0x3F813F80),
        ("fma.rn.f32 %r1, 0f3F800001, 0f3F800001, 0fBF800002", 0x28800000),
        ("mul.ftz.f32 %r1, 0f80800000, 0f3F000000", 0x80000000),
        ("mul.f32 %r1, 0f80800000, 0f3F000000", 0x80400000),
        ("max.f32 %r1, 0f7FC00000, 0f3F800000", 0x3F800000),
        ("max.NaN.f32 %r1, 0f7FC00000, 0f3F800000", 0x7FFFFFFF),
        ("sub.f32 %r1, 0fFF800000, 0fFF800000", 0x7FFFFFFF),
        ("copysign.f32 %r1, 0f80000000, 0f3F800000", 0xBF800000),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else None,
)
def test_an_instruction(instruction, wanted):
    assert words(f"\t{instruction};") == [wanted] * 32


@pytest.mark.parametrize(
    ("comparison", "pairs"),
    [
        ("lt.f32", "YNN"),
        ("ltu.f32", "YNY"),
        ("ne.f32", "YNN"),
        ("neu.f32", "YNY"),
        ("geu.f32", "NYY"),
        ("nan.f32", "NNY"),
    ],
)
def test_comparisons_of_nan(comparison, pairs):
    """Compare 1 with 2, 1 with 1, and 1 with NaN."""
    for other, answer in zip(("0f40000000", "0f3F800000", "0f7FC00000"), pairs, strict=True):
        body = f"\tsetp.{comparison} %p1, 0f3F800000, {other};\n\tselp.b32 %r1, 1, 0, %p1;"
        assert words(body) == [int(answer == "Y")] * 32


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("shfl.sync.bfly.b32 %r1, %r0, 3, 31, -1", lambda lane: lane ^ 3),
        ("shfl.sync.down.b32 %r1, %r0, 5, 31, -1", lambda lane: lane + 5 if lane < 27 else lane),
        ("shfl.sync.up.b32 %r1, %r0, 5, 0, -1", lambda lane: lane - 5 if lane >= 5 else lane),
        ("shfl.sync.idx.b32 %r1, %r0, 7, 31, -1", lambda lane: 7),
        ("shfl.sync.idx.b32 %r1, %r0, 2, 0x181f, -1", lambda lane: lane // 8 * 8 + 2),
        ("redux.sync.add.u32 %r1, %r0, -1", lambda lane: 496),
        ("redux.sync.max.s32 %r1, %r0, -1", lambda lane: 31),
        ("setp.lt.u32 %p1, %r0, 5;\n\tvote.sync.ballot.b32 %r1, %p1, -1", lambda lane: 31),
        ("shr.u32 %r2, %r0, 4;\n\tmatch.any.sync.b32 %r1, %r2, -1", lambda lane: 0xFFFF << lane // 16 * 16),
    ],
    ids=lambda value: value.replace("\n\t", " ").split("sync")[-1] if isinstance(value, str) else "",
)
def test_a_warp(instruction, wanted):
    both = words(f"\t{instruction};", threads=64)
    assert both[:32] == [wanted(lane) for lane in range(32)]
    assert [each - 32 if "shfl" in instruction else 0 for each in both[32:]] == (
        both[:32] if "shfl" in instruction else [0] * 32
    )


def test_an_unknown_instruction_is_named():
    with pytest.raises(PtxError, match=r"unknown opcode wgmma: wgmma\.fence"):
        execute("\twgmma.fence.sync.aligned;")
    with pytest.raises(PtxError, match=r"unknown form of add: add\.f16x2"):
        execute("\tadd.f16x2 %r1, %r0, %r0;")
    with pytest.raises(PtxError, match="register '%r7' is read before it is written"):
        execute("\tadd.s32 %r1, %r7, %r7;")


def test_the_approximations_are_within_their_bounds():
    """With an error of 1 the functions of the hardware differ from the exact ones, by no more than their bounds."""
    x = torch.linspace(0.3, 7, 32)
    functions = {"ex2": torch.exp2, "lg2": torch.log2, "sin": torch.sin, "cos": torch.cos, "sqrt": torch.sqrt,
                 "rsqrt": torch.rsqrt, "rcp": torch.reciprocal}  # fmt: skip
    for name, function in functions.items():
        exact = function(x.double())
        for error in (0.0, 1.0):
            out = torch.zeros(32)
            body = f"""
	mul.wide.u32 %rd8, %r0, 4;
	add.s64 %rd9, %rd1, %rd8;
	ld.global.f32 %f1, [%rd9];
	{name}.approx.f32 %f2, %f1;
	mov.b32 %r1, %f2;"""
            execute(body + STORE, out, x, error=error)
            off = ((out - exact).abs() / exact.abs().clamp(min=1 if name in ("lg2", "sin", "cos") else 0)).max()
            assert off <= 2.0**-24 + (error and 2.0**-20.5), name
            assert error == 0 or off > 2.0**-24, name


# ---- the order of threads ----

LOOP = """
	mov.u32 %r1, 0;
	and.b32 %r2, %r0, 7;
$again:
	setp.eq.u32 %p1, %r2, 0;
	@%p1 bra $done;
	add.u32 %r1, %r1, %r2;
	sub.u32 %r2, %r2, 1;
	bra.uni $again;
$done:
"""


def test_threads_that_part_meet_again():
    """Threads leave a loop after 0 to 7 rounds, and then exchange their sums."""
    sums = [n * (n + 1) // 2 for n in range(8)] * 4
    assert words(LOOP) == sums
    assert words(LOOP + "\tshfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;") == [sums[lane ^ 1] for lane in range(32)]


def test_threads_of_a_warp_wait_for_those_that_they_name():
    """Even and odd lanes take the same shuffle on different ways: the second way comes first in the code."""
    body = """
	and.b32 %r2, %r0, 1;
	setp.eq.u32 %p1, %r2, 0;
	@%p1 bra $even;
	mov.u32 %r3, 100;
	bra.uni $both;
$both:
	shfl.sync.bfly.b32 %r1, %r3, 1, 31, -1;
	bra.uni $end;
$even:
	mov.u32 %r3, 200;
	bra.uni $both;
$end:
"""
    assert words(body) == [100, 200] * 16


@pytest.mark.parametrize("instruction", ["shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1", "bar.sync 0", "bar.warp.sync -1"])
def test_threads_that_never_come(instruction):
    with pytest.raises(PtxError, match="threads wait here for others that never come"):
        execute(f"\tsetp.lt.u32 %p1, %r0, 9;\n\t@%p1 bra $out;\n\t{instruction};\n\tbra $end;\n$out:\n\tbra $out2;\n"
                "$out2:\n\tbar.warp.sync 511;\n\tbra $end2;\n$end:\n$end2:\n\tmov.u32 %r1, 0;"
                if "bar.sync" not in instruction else
                f"\tsetp.lt.u32 %p1, %r0, 9;\n\t@%p1 {instruction};\n$here:\n\tsetp.lt.u32 %p2, %r0, 9;\n"
                "\t@!%p2 bar.warp.sync -1;")  # fmt: skip


def test_a_barrier_does_not_wait_for_threads_that_have_ended():
    execute("\tsetp.lt.u32 %p1, %r0, 32;\n\t@%p1 ret;\n\tbar.sync 0;", threads=64)


def test_atomic_changes_come_one_after_the_other():
    """Each thread of each program gets a number of its own."""
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    body = """
	atom.global.add.u32 %r1, [%rd1], 1;
	mul.wide.u32 %rd8, %r1, 4;
	add.s64 %rd9, %rd0, %rd8;
	red.global.max.s32 [%rd9], 1;
	red.global.max.s32 [%rd9], 0;
"""
    execute(body, seen, counter, programs=3)
    assert int(counter) == 96
    assert seen.tolist() == [1] * 96


def test_compare_and_swap():
    lock = torch.zeros(1, dtype=torch.int32)
    winners = torch.zeros(32, dtype=torch.int32)
    execute("\tadd.u32 %r2, %r0, 5;\n\tatom.global.cas.b32 %r1, [%rd1], 0, %r2;" + STORE, winners, lock)
    assert int(lock) == 5
    assert winners.tolist() == [0] + [5] * 31


# ---- memory ----


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


# ---- the text ----


def test_the_parser_reads_what_compilers_write():
    kernel = parse("""
.extern .shared .align 16 .b8 dynamic[];
.shared .align 8 .b8 fixed[12];
.global .align 4 .b8 table[8] = {1, 2, 255};
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .align 8 .b8 k_param_1[20],
	.param .u8 k_param_2,
	.param .f64 k_param_3
)
.maxntid 256, 1, 1
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<4>;
	.loc	1 76 0                          // cross_entropy.py:76:0
$L__BB0_1: { .reg .pred q; setp.ne.b32 q, %r1, 0; // a comment; and another
	@!q bra $L__BB0_1; }
	// begin inline asm
	@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %r3 + -4 ];

	// end inline asm
	ret;
}
""", "k")  # fmt: skip
    assert [(p.name, p.offset, p.size) for p in kernel.parameters] == [
        ("k_param_0", 0, 8), ("k_param_1", 8, 20), ("k_param_2", 28, 1), ("k_param_3", 32, 8)
    ]  # fmt: skip
    assert kernel.threads == 256
    assert kernel.labels == {"$L__BB0_1": 0}
    assert [i.opcode for i in kernel.code] == ["setp", "bra", "ld", "ret"]
    load = kernel.code[2]
    assert (load.guard, load.operands) == ("%p1", ("{ %r1, %r2 }", "[ %r3 + -4 ]"))
    assert str(load).endswith("(cross_entropy.py:76:0)")
    assert kernel.registers["q"] == "pred"
    assert kernel.shared_bytes == 12
    assert kernel.constants == {"table": b"\x01\x02\xff\0\0\0\0\0"}


def test_a_parameter_of_every_size():
    out = torch.zeros(32, dtype=torch.int32)
    text = HEADER.format(
        parameters=".param .u64 a, .param .u8 b, .param .s16 c, .param .align 8 .b8 d[16]", threads=32,
        body="""
	ld.param.u64 %rd0, [a];
	ld.param.u8 %rs1, [b];
	ld.param.s16 %r2, [c];
	mov.b64 %rd1, d;
	ld.param.v2.u32 {%r3, %r4}, [%rd1+8];
	cvt.u32.u16 %r1, %rs1;
	add.s32 %r1, %r1, %r2;
	add.s32 %r1, %r1, %r4;
	mov.u32 %r0, %tid.x;
""" + STORE)  # fmt: skip
    parameters = struct.pack("<QBxhxxxx", out.data_ptr(), 200, -300) + struct.pack("<qII", 0, 5, 1000)
    run(text, parameters, 1, [span_of(out)])
    assert out.tolist() == [900] * 32
    assert np.dtype(np.int32).itemsize == out.element_size()
