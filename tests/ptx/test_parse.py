"""What is read of a text, and what is refused."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import kernel, run
from .operands import Address, Immediate, Pair, Register, Special, Vector
from .parse import parse

TEXT = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 dynamic[];
.visible .entry first(
    .param .u64 .ptr .global .align 1 first_param_0, // a pointer
    .param .u32 count, .param .align 8 .b8 plan[20], .param .f32 scale
)
.reqntid 128, 1, 1
.minnctapersm 2
{
    .reg .pred %p<3>; .reg .b32 %r<5>, %single;
    .shared .align 8 .b8 tile[100];
    .loc 1 20 5 // no semicolon
    mov.u32 %r1, %tid.x;
$loop: /* a comment
    over lines */
    { .reg .b64 %r1, t; mov.b64 t, {%r2, %r3}; bra.uni inner; inner: }
    @!%p1 bra $loop;
    ld.shared.v2.b32 {%r1, _}, [%r2+-8];
    shfl.sync.bfly.b32 %r1|%p2, %single, 0x1F, 0f3F800000, -1;
    ret;
}
.entry second() { ret; }
"""


def test_parameters_have_the_offsets_of_a_structure():
    parameters = parse(TEXT)["first"].parameters
    assert [(each.name, each.type, each.bytes, each.offset) for each in parameters] == [
        ("first_param_0", "u64", 8, 0), ("count", "u32", 4, 8), ("plan", "b8", 20, 16), ("scale", "f32", 4, 36),
    ]  # fmt: skip


def test_what_is_declared():
    module = parse(TEXT)
    assert list(module) == ["first", "second"] and module["second"].parameters == []
    first = module["first"]
    assert first.reqntid == (128, 1, 1) and module["second"].reqntid is None
    assert [tuple(each) for each in first.shared] == [("dynamic", None, 16), ("tile", 100, 8)]
    assert first.register_type("%r4") == "b32" and first.register_type("%single") == "b32"
    assert first.register_type("%q4") is None


def test_instructions_are_taken_apart_once():
    found = parse(TEXT)["first"].instructions
    assert [each.opcode for each in found] == ["mov", "mov", "bra", "bra", "ld", "shfl", "ret"]
    assert found[0].operands == (Register("%r1"), Special("%tid.x")) and found[0].line == 15
    assert found[3].guard == Register("%p1", negated=True) and found[3].text == "@!%p1 bra $loop"
    assert found[4].modifiers == ("shared", "v2", "b32") and found[4].types == ("b32",)
    assert found[4].operands == (Vector((Register("%r1"), Register("_"))), Address(Register("%r2"), -8))
    pair, _, mask, one, minus = found[5].operands
    assert pair == Pair(Register("%r1"), Register("%p2"))
    assert mask == Immediate(31) and one == Immediate(0x3F800000, 32) and minus == Immediate(-1)


def test_names_of_inner_braces_are_their_own():
    first = parse(TEXT)["first"]
    inner = first.instructions[1].operands[0].name
    assert first.register_type(inner) == "b64" and inner != "t"
    assert first.labels["$loop"] == 1
    assert first.labels[first.instructions[2].operands[0].name] == 3


@pytest.mark.parametrize(
    "body, words",
    [
        ("frobnicate.b32 %r1, %r2;", "instruction frobnicate is not known"),
        ("add.sideways.u32 %r1, %r1, %r2;", "modifier .sideways of add is not known"),
        ("add.b32 %r1, %r1, %r2;", "type .b32 of add is not known"),
        ("ld.global.b128 %r1, [%rd0];", "type .b128 of ld is not known"),
        ("mov.u32 %r1, %nowhere.x;", "%nowhere.x is not known"),
        ("mov.u32 %r1, %undeclared9;", "%undeclared9 is not known"),
        ("add.u64 %r1, %rd1, %rd2;", "%r1 is narrower than u64"),
        ("mov.u64 %rd1, elsewhere;", "elsewhere is not known"),
        ("bra $elsewhere;", "leads nowhere"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r1}, {%f1};", "m16n8k32 of mma"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r0}, %rd0, %rd1, 1, 1, 1, 0, 0;", "wgmma"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(body, words):
    out = np.zeros(1, np.uint32)
    with pytest.raises(PtxError, match=words) as caught:
        run("mov.u32 %r9, 7; st.global.u32 [%rd0], %r9;\n" + body, out, block=32)
    assert caught.value.kernel == "small" and caught.value.text.startswith(body.split()[0]) and caught.value.line
    assert out[0] == 0


def test_unknown_directives_are_refused():
    with pytest.raises(PtxError, match=r"directive \.frobnicate is not known"):
        kernel(".frobnicate 3;")
