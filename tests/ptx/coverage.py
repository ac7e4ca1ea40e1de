"""Which kernels, tiles and options the Triton hosts can choose, and which of them the calls of triton_matrix.py reach.

python -m tests.ptx.coverage prints the list.
"""

import itertools
import sys
from collections.abc import Iterator

import torch

from tests.ptx.launches import Launch
from tests.ptx.triton_matrix import TARGETS, everything

CAPABILITIES = (80, 90)


def possible(dtype: str) -> list[Launch]:
    """What the hosts launch for calls of every kind and size; on a worker."""
    from tests.ptx import hosts

    def tensor(*shape: int, of: str = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, of), device="meta")

    with hosts.launches(0, dtype, run=False) as seen:
        for sweep in (_attention, _tied_ffn, _dynamic_mixing, _upconv):
            sweep(tensor)
    return seen


def reached() -> list[Launch]:
    """What the calls launch; on a worker."""
    from tests.ptx.triton_calls import launched

    return [launch for call, capability in everything() for launch in launched(call, capability)]


def missing(possible: list[Launch], reached: list[Launch]) -> list[str]:
    """What can be chosen and is not reached, a line each."""
    return [line for line, is_reached in table(possible, reached) if not is_reached]


def table(possible: list[Launch], reached: list[Launch]) -> Iterator[tuple[str, bool]]:
    """Every line of the list, and whether it is reached."""
    seen = {line for launch in reached for line in _lines(launch, [launch.capability])}
    for line in sorted({line for launch in possible for line in _lines(launch, CAPABILITIES)}):
        yield line, line in seen


def _lines(launch: Launch, capabilities) -> Iterator[str]:
    """A tile for each dtype; in 16 bits for each GPU, too; each option; each dtype on each GPU."""
    tile = " ".join(f"{name}={value}" for name, value in sorted(launch.tile.items()))
    yield f"{launch.kernel} {launch.dtype}: {tile}"
    for capability in capabilities:
        yield f"{launch.kernel} {launch.dtype} on sm_{capability}"
        if launch.dtype != "float32":
            yield f"{launch.kernel} 16 bits on sm_{capability}: {tile}"
    for name, value in launch.flags.items():
        yield f"{launch.kernel}: {name}={value:d}" if isinstance(value, int) else f"{launch.kernel}: {name}={value}"


def _forms(operator: str) -> list[str]:
    """Those of the operator's Triton kernels."""
    from tokenfusion.kernels.dispatch import OPERATORS

    return [each.form for each in OPERATORS[operator].implementations if each.backend == "triton"]


def _attention(tensor) -> None:
    from tokenfusion.kernels.single_query_attention import triton_host as host

    def call(
        batch, queries, tokens, channels, extra=True, bags=(False, False), normalize=True, needed=(True,) * 3, form=""
    ):
        query, x = tensor(batch, queries, channels), tensor(batch, tokens, channels)
        extra_token = tensor(batch, channels) if extra else tensor(0)
        given = [tensor(batch + i, of="int64") if there else None for i, there in enumerate(bags)]
        operands = query, x, extra_token if extra else None, *given
        context, lse = host.run_forward(*operands, normalize, 1e-6, form)
        needed = [needed[0], needed[1], extra and needed[2]]
        host.run_backward(context, *operands, context, lse, normalize, 1e-6, needed, form)

    for channels in (*range(8, host.MAX_CHANNELS_ON_CHIP + 1, 8), 2048, 4096):
        for queries in (4, 24, 64):
            call(256, queries, 401, channels)
    for tokens in (1, 40, 70, 230, 450, 900):
        for channels, form in itertools.product((192, 2048), _forms("single_query_attention")):
            call(1, 4, tokens, channels, form=form)
    flags = (False, True)
    for channels, extra, lengths, offsets, normalize in itertools.product((192, 2048), *[flags] * 4):
        call(2, 4, 40, channels, extra, (lengths, offsets), normalize)
    for channels, *needed in itertools.product((192, 2048), *[flags] * 3):
        call(2, 4, 40, channels, needed=needed)
    for channels in (20, 2052):
        call(2, 4, 40, channels)


def _tied_ffn(tensor) -> None:
    from tokenfusion.kernels.tied_ffn import reference
    from tokenfusion.kernels.tied_ffn import triton_host as host

    def call(channels, activation="gelu", bias=True, hold=False, form=""):
        x, weight = tensor(100, channels), tensor(4 * channels, channels)
        biases = (tensor(4 * channels), tensor(channels)) if bias else (None, None)
        _, hidden = host.run_forward(x, weight, *biases, activation, hold, form)
        host.run_backward(x, x, weight, biases[0], hidden, activation, [True] * 4, form)

    sizes = *range(1, host.NARROW + 9), 384, 768, 1024
    for channels, form in itertools.product(sizes, _forms("tied_ffn")):
        call(channels, form=form)
    flags = (False, True)
    for channels, *options in itertools.product((96, 384), reference.ACTIVATIONS, flags, flags):
        call(channels, *options)


def _dynamic_mixing(tensor) -> None:
    from tokenfusion.kernels.dynamic_mixing import op
    from tokenfusion.kernels.dynamic_mixing import triton_host as host

    def call(length, reduced, width, with_mean):
        x, compressed = tensor(2, length, 3, 2 * width), tensor(2, length, 3, 2 * reduced)
        operands = x, compressed, tensor(length**2, length * reduced), tensor(length**2), 2, 1
        mixed, mean = host.run_forward(*operands, with_mean)
        host.run_backward(mixed, mean if with_mean else None, *operands, [True] * 4)

    lengths, depths = range(1, op.MAX_TOKENS + 1), (1, 2, 3, 8, op.MAX_REDUCED)
    for length, reduced, width in itertools.product(lengths, depths, (1, 16, 24)):
        call(length, reduced, width, with_mean=length % 2 == 0)


def _upconv(tensor) -> None:
    from tokenfusion.kernels.upconv.concat import triton_host as concat
    from tokenfusion.kernels.upconv.project import triton_host as project

    for form, channels, scale, skipped, last, bias in itertools.product(
        _forms("upconv_concat"), (8, 96, 768), (2, 4, 8, 16, 32), (0, 8), (False, True), (False, True)
    ):
        layout = torch.channels_last if last else torch.contiguous_format
        x, weight = tensor(2, channels, 7, 7).contiguous(memory_format=layout), tensor(channels, 8, scale, scale)
        skip = tensor(2, skipped, 7 * scale, 7 * scale) if skipped else None
        given_bias = tensor(8) if bias else None
        out = concat.run_forward(x, weight, given_bias, skip, False, last, form)
        concat.run_backward(out[:, :8], x, weight, [True] * 3, form)
        for projects in (False, True) if skipped else (False,):
            proj_skip = tensor(8, skipped) if projects else None
            project.run_forward(x, weight, given_bias, skip, None, proj_skip, last, form)


def main() -> None:
    from tests.ptx import coverage  # the worker knows no __main__
    from tests.ptx.worker import Worker

    with Worker() as worker:
        can_be = [launch for dtype in TARGETS for launch in worker.call(coverage.possible, dtype)]
        for line, is_reached in table(can_be, worker.call(coverage.reached)):
            print(" " if is_reached else "-", line)


if __name__ == "__main__":
    sys.exit(main())
