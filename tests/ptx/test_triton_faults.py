"""Triton's compiled kernels, broken on purpose in every way that the interpreter claims to see, and seen to be."""

import re
from dataclasses import dataclass

import pytest

pytest.importorskip("triton")

from tests.ptx.triton_calls import Call, check


def _attention(dtype: str) -> Call:
    sizes = dict(batch=1, queries=6, tokens=70, channels=64, extra=True)
    return Call("single_query_attention", dtype, sizes, dict(MAX_SPLITS=1))


CALLS = {  # kernel: a call that launches it, and the GPU
    "forward_kernel": (_attention("bfloat16"), 90),
    "backward_kernel": (_attention("float16"), 80),
    "linear_kernel": (Call("tied_ffn", "float16", dict(tokens=70, channels=136, features=72)), 80),
}


@dataclass(frozen=True)
class Broken:
    """The n-th match of a pattern in a kernel's PTX is replaced."""

    kernel: str
    pattern: str
    replacement: str
    number: int = 0

    def __call__(self, name: str, text: str) -> str:
        if name != self.kernel:
            return text
        found = list(re.finditer(self.pattern, text, re.MULTILINE))[self.number]
        return text[: found.start()] + found.expand(self.replacement) + text[found.end() :]


BARRIER = r"^\tbar\.sync[^;]*;"
WAIT = r"^(\tcp\.async\.wait_group\s+)\d+"
LOAD = r"^(\t@%p\d+ ld\.global[^\[;]*\[ %rd\d+ \+) 0"
STORE = r"^\t@%p\d+ (st\.global)"
RACE, PENDING, OUTSIDE = "a race", "asynchronous copy may be writing", "outside of every tensor"
WRONG = "allowed"

FAULTS = {
    **{f"barrier {i}": (Broken("forward_kernel", BARRIER, "", i), RACE) for i in (0, 1, 4, 9, -1)},
    **{f"barrier {i} of a pipeline": (Broken("linear_kernel", BARRIER, "", i), RACE) for i in (1, 2)},
    "a wait too early": (Broken("linear_kernel", WAIT, r"\g<1>3"), PENDING),
    "no wait at the end": (Broken("linear_kernel", WAIT, r"\g<1>9", -1), PENDING),
    "two groups of copies in one": (Broken("linear_kernel", r"^\tcp\.async\.commit_group;", "", -1), PENDING),
    "copies never committed": (Broken("forward_kernel", r"^\tcp\.async\.commit_group;", ""), PENDING),
    "a product not waited for": (
        Broken("forward_kernel", r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1"),
        "before the wgmma that uses it is waited for",
    ),
    "no fence between proxies": (
        Broken("forward_kernel", r"^\tfence\.proxy[^;]*;", ""),
        "reads what threads have written",
    ),
    "another swizzle": (Broken("linear_kernel", r"(xor\.b32 \t%r\d+, %r\d+,) 64;", r"\1 32;"), f"{RACE}|{WRONG}"),
    "another swizzle, backward": (Broken("backward_kernel", r"(xor\.b32 \t%r\d+, %r\d+,) 32;", r"\1 64;"), WRONG),
    "another lane": (Broken("forward_kernel", r"(shfl\.sync\.bfly\.b32 \t[^;]*,) 2(, 31, -1;)", r"\1 1\2"), WRONG),
    "operands exchanged": (
        Broken("linear_kernel", r"(mma\.sync[^{]*\{[^}]*\}, \{ %r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
        WRONG,
    ),
    "a load far away": (Broken("forward_kernel", LOAD, r"\1 1073741824"), OUTSIDE),
    "a load just beyond the end": (Broken("forward_kernel", LOAD, r"\1 2048"), OUTSIDE),
    "a load without its mask": (Broken("forward_kernel", r"^\t@%p\d+ (ld\.global)", r"\t\1"), OUTSIDE),
    "a copy without its mask": (Broken("forward_kernel", r"(selp\.b32 \t%r\d+, 16,) 0", r"\1 16", -1), OUTSIDE),
    "a store without its mask": (Broken("linear_kernel", STORE, r"\t\1", -1), OUTSIDE),
    "a store left out": (Broken("linear_kernel", STORE + "[^;]*;", ""), WRONG),
    "a misaligned load": (Broken("forward_kernel", LOAD, r"\1 2"), "misaligned"),
    "shared memory beyond the end": (
        Broken("forward_kernel", r"^(\t(?:@%p\d+ )?st\.shared\S* \[ %r\d+ \+) 0", r"\1 262144"),
        "shared memory",
    ),
    "shared memory never written": (
        Broken("forward_kernel", r"^\t(?:@%p\d+ )?st\.shared[^;]*;", ""),
        "memory that nothing has written",
    ),
    "a lane that does not come": (Broken("forward_kernel", r"^\t(shfl\.sync\.bfly)", r"\t@%p1 \1"), "divergent"),
    "an instruction that is not known": (
        Broken("forward_kernel", r"^\tmul\.f32", r"\tmul.sideways.f32"),
        r"sideways.*\n.*forward_kernel",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_is_seen(fault, worker):
    broken, message = FAULTS[fault]
    call, capability = CALLS[broken.kernel]
    with pytest.raises(AssertionError, match=message):
        worker.call(check, call, capability, change=broken)


@pytest.mark.parametrize("kernel", CALLS)
def test_the_unbroken_kernel_is_right(kernel, worker):
    call, capability = CALLS[kernel]
    assert any(launch.kernel.endswith(kernel) for launch in worker.call(check, call, capability))
