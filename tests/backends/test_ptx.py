"""The interpreter of PTX itself: its parser, its instructions, and the order of threads."""

from __future__ import annotations

import struct

import pytest
import torch
from ptx.bodies import HEADER, STORE, execute, words
from ptx.execution import run, span_of
from ptx.parser import PtxError, parse

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
        ("max.bf16x2 %r1, 0xBF807FC0, 0x3F804000", 0x3F804000),
        ("max.f16x2 %r1, 0x3C00FC00, 0x3BFF7E00", 0x3C00FC00),
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


@pytest.mark.parametrize(
    "body",
    [
        "@%p1 ret;\n\tshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
        "@%p1 ret;\n\tbar.warp.sync -1;",
        "@%p1 bra $few;\n\tbar.sync 0;\n\tret;\n$few:\n\tbar.sync 0;",
    ],
    ids=["shuffle", "barrier of a warp", "barriers at two places"],
)
def test_threads_that_never_come(body):
    with pytest.raises(PtxError, match="threads wait here for others that never come"):
        execute("\tsetp.lt.u32 %p1, %r0, 9;\n\t" + body)


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
