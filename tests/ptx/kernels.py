"""Small kernels for tests of the interpreter."""

from collections.abc import Sequence

import numpy as np
import torch

from .launch import launch
from .memory import Memory
from .parse import Kernel, parse

_REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<128>;
    .reg .f32 %f<300>;
    .reg .b64 %rd<64>;
"""


def kernel(body: str, tensors: int = 0, declarations: str = "", parameters: Sequence[str] = ()) -> Kernel:
    """A kernel of the body, with %r0 as the thread's number and %rd0, %rd1, ... as the tensors' addresses."""
    declared = [f".param .u64 p{number}" for number in range(tensors)] + list(parameters)
    loads = "".join(f"ld.param.u64 %rd{number}, [p{number}];\n" for number in range(tensors))
    text = f"""
        .version 8.7
        .target sm_90a
        .address_size 64
        {declarations}
        .visible .entry small({", ".join(declared)})
        {{
            {_REGISTERS}
            {loads}
            mov.u32 %r0, %tid.x;
            {body}
            ret;
        }}
    """
    (made,) = parse(text).values()
    return made


def run(body: str, *arrays: np.ndarray, block=32, grid=1, declarations: str = "", arguments=(), **options) -> None:
    """Runs the body on the arrays in place. `arguments`: (declaration, value) of further parameters."""
    memory = Memory()
    addresses = [memory.allow(torch.from_numpy(array)) for array in arrays]
    made = kernel(body, len(arrays), declarations, [declaration for declaration, _ in arguments])
    launch(made, [*addresses, *(value for _, value in arguments)], grid, block, memory=memory, **options)


def evaluate(text: str, result: type, *operands, **options) -> np.ndarray:
    """What %d is after the instruction(s), for each element of the operands %a, %b, %c, %e: one thread an element.

    Registers have the width of the operands' numpy type; bool is a predicate. Bytes are in registers of 16 bits.
    """
    operands = [np.atleast_1d(np.asarray(each)) for each in operands]
    count = max(map(len, operands), default=1)
    block = 32 if count <= 32 else 128
    threads = -(-count // block) * block
    padded = [np.resize(each, threads) if len(each) == count else np.repeat(each, threads) for each in operands]
    out = np.zeros(threads, np.uint8 if result is bool else result)
    body = ""
    for number, (name, each) in enumerate(zip("abce", padded)):
        body += _declare(name, each.dtype) + _move("ld", name, each.dtype, number)
    body += _declare("d", np.dtype(result)) + text
    body += _move("st", "d", np.dtype(result), len(padded))
    stored = [each.astype(np.uint8) if each.dtype == bool else np.ascontiguousarray(each) for each in padded]
    run(body, *stored, out, block=block, grid=threads // block, **options)
    return out[:count].astype(result)


def _declare(name: str, dtype: np.dtype) -> str:
    kind = "pred" if dtype.kind == "b" else f"b{max(16, dtype.itemsize * 8)}"
    return f".reg .{kind} %{name};\n"


def _move(what: str, name: str, dtype: np.dtype, tensor: int) -> str:
    """One element a thread, to or from the tensor."""
    size = dtype.itemsize
    place = "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r1, %r1, %r2, %r0;\n"
    place += f"mul.wide.u32 %rd60, %r1, {size}; add.u64 %rd60, %rd60, %rd{tensor};\n"
    if dtype.kind != "b":
        kind = f"b{size * 8}"
        return place + (
            f"ld.global.{kind} %{name}, [%rd60];\n" if what == "ld" else f"st.global.{kind} [%rd60], %{name};\n"
        )
    if what == "ld":
        return place + f"ld.global.u8 %h31, [%rd60]; setp.ne.b16 %{name}, %h31, 0;\n"
    return place + f"selp.b16 %h31, 1, 0, %{name}; st.global.u8 [%rd60], %h31;\n"


def random_bits(seed: int, dtype: type, count: int = 256) -> np.ndarray:
    """Numbers of all magnitudes: random bits, with zeros, ones and extremes among them."""
    generator = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    values = generator.integers(0, 256, count * size, dtype=np.uint8).view(dtype).copy()
    ones = np.array([0, 1, -1 & ((1 << 8 * size) - 1), 1 << (8 * size - 1), (1 << (8 * size - 1)) - 1], f"u{size}")
    places = generator.permutation(count)[: 4 * len(ones)]
    values[places] = np.tile(ones, 4).view(dtype)[: len(places)]
    return values


def random_floats(seed: int, dtype: type = np.float32, count: int = 512, finite: bool = False) -> np.ndarray:
    """Of all magnitudes, with zeros, subnormals, infinities and NaN."""
    values = random_bits(seed, dtype, count)
    if finite:
        return np.where(np.isfinite(values), values, dtype(1.5))
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny / 4, -np.finfo(dtype).max]
    values[:: max(1, count // 36)][: len(special)] = np.array(special, dtype)[: len(values[:: max(1, count // 36)])]
    return values
