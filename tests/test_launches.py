"""Whatever fits into a GPU's memory can be launched, and no offset in it leaves its integer."""

import pytest
import torch

pytest.importorskip("triton")

from tests import launches
from tests.launches import meta
from tokenfusion.kernels import triton_support
from tokenfusion.kernels.dynamic_mixing import triton_host as dynamic_mixing
from tokenfusion.kernels.dynamic_mixing.op import MAX_TRITON_WIDTH, _why_not_triton_kernel
from tokenfusion.kernels.single_query_attention import triton_host as single_query_attention
from tokenfusion.kernels.tied_ffn import triton_host as tied_ffn
from tokenfusion.kernels.upconv.arguments import _why_not_image
from tokenfusion.kernels.upconv.concat import triton_host as upconv

LAST = torch.channels_last


def tied_ffn_calls(tokens: int, channels: int, features: int) -> list[tuple]:
    x, weight, bias_in, bias_out = meta(tokens, channels), meta(features, channels), meta(features), meta(channels)
    return [
        ("tied_ffn", "run_forward", x, weight, bias_in, bias_out, "gelu", False),
        ("tied_ffn", "run_forward", x, weight, bias_in, bias_out, "gelu", True),
        ("tied_ffn", "run_backward", x, x, weight, bias_in, meta(0), "gelu", [True] * 4),
        ("tied_ffn", "run_backward", x, x, weight, bias_in, meta(tokens, features), "gelu", [True] * 4),
    ]


def attention_forward(batch: int, queries: int, tokens: int, channels: int) -> tuple:
    tensors = meta(batch, queries, channels), meta(batch, tokens, channels), meta(batch, channels)
    return ("single_query_attention", "run_forward", *tensors, None, None, True, 1e-6)


def attention_calls(batch: int, queries: int, tokens: int, channels: int) -> list[tuple]:
    query, x, extra = meta(batch, queries, channels), meta(batch, tokens, channels), meta(batch, channels)
    backward = query, query, x, extra, None, None, query, meta(batch, queries, dtype=torch.float32), True, 1e-6
    return [
        attention_forward(batch, queries, tokens, channels),
        ("single_query_attention", "run_backward", *backward, [True] * 3),
    ]


def mixing_calls(batch: int, height: int, width: int, channels: int, segments: int, reduced: int) -> list[tuple]:
    x, compressed = meta(batch, height, width, channels), meta(batch, height, width, segments * reduced)
    calls = []
    for dim in (1, 2):
        length = x.shape[dim]
        tensors = x, compressed, meta(length**2, length * reduced), meta(length**2)
        calls.append(("dynamic_mixing", "run_forward", *tensors, segments, dim, True))
        calls.append(("dynamic_mixing", "run_backward", x, meta(batch, channels), *tensors, segments, dim, [True] * 4))
    return calls


def upconv_calls(batch: int, inputs: int, channels: int, size: int, scale: int, skipped: int) -> list[tuple]:
    calls = []
    for layout in (torch.contiguous_format, LAST):
        x, skip, up = (
            meta(batch, count, side, side).to(memory_format=layout)
            for count, side in ((inputs, size), (skipped, scale * size), (channels, scale * size))
        )
        weight, bias = meta(inputs, channels, scale, scale), meta(channels)
        calls += [
            ("upconv.concat", "run_forward", x, weight, bias, skip, False, layout is LAST),
            ("upconv.concat", "run_backward", up, x, weight, [True] * 3),
            ("upconv.project", "run_forward", x, weight, bias, skip, None, meta(channels, skipped), layout is LAST),
        ]
    return calls


LARGE = [
    *tied_ffn_calls(1 << 26, 64, 16),
    *tied_ffn_calls(1 << 26, 136, 16),
    *tied_ffn_calls(16, 1 << 25, 24),
    *tied_ffn_calls(16, 24, 1 << 25),
    *attention_calls(1 << 25, 1, 3, 16),
    *attention_calls(1 << 22, 2, 3, 1040),
    *attention_calls(1, 1, 1 << 25, 64),
    *attention_calls(1, 1, 64, 1 << 22),
    attention_forward(1, 1 << 23, 100, 64),
    attention_forward(1, 1 << 23, 100, 1040),
    *mixing_calls(1 << 20, 14, 14, 32, 4, 2),
    *mixing_calls(1, 64, 16, MAX_TRITON_WIDTH, 1, 2),
    *mixing_calls(1 << 12, 64, 4, 16, 1, 16),
    *upconv_calls(1 << 8, 3, 4, 1 << 11, 2, 3),
    *upconv_calls(1, 1 << 21, 3, 4, 2, 3),
    *upconv_calls(1, 3, 1 << 21, 4, 2, 3),
]
FAR = {
    "tokens of tied_ffn": tied_ffn_calls((1 << 31) + 999, 1, 1),
    "wide tokens of tied_ffn": tied_ffn_calls((1 << 24) + 9, 136, 130),
    "images": attention_calls((1 << 22) + 3, 1, 3, 520),
    "tokens": attention_calls(2, 3, (1 << 22) + 5, 512),
    "queries": [attention_forward(1, (1 << 21) + 3, 20, 1024)],
    "wide images": attention_calls((1 << 21) + 3, 2, 3, 1040),
    "wide tokens": attention_calls(2, 3, (1 << 16) + 5, 33000),
    "wide queries": [attention_forward(1, (1 << 21) + 3, 20, 1040)],
    "lines": mixing_calls((1 << 17) + 3, 16, 16, 64, 4, 2),
    "long tokens": mixing_calls(1, 16, 16, (1 << 24) + 32, 1 << 19, 1),
    "pixels": upconv_calls((1 << 9) + 1, 1, 1, 1 << 11, 2, 1),
    "large images": upconv_calls(1, 40, 33, 1 << 13, 2, 20),
}


def many_splits(monkeypatch) -> None:
    """So that no program has more than some steps."""
    monkeypatch.setattr(tied_ffn, "MAX_SPLITS", 1 << 30)
    monkeypatch.setattr(single_query_attention, "MAX_SPLITS", 1 << 13)
    monkeypatch.setitem(single_query_attention.PROGRAMS_PER_MULTIPROCESSOR, "", 1 << 16)
    monkeypatch.setattr(dynamic_mixing, "WEIGHT_SPLITS", 1 << 15)
    monkeypatch.setattr(upconv, "_MAX_SPLITS", 1 << 30)
    monkeypatch.setattr(upconv, "_PROGRAMS", 1 << 23)


@pytest.mark.parametrize("call", LARGE, ids=lambda call: f"{call[0]} {call[1]}")
def test_a_grid_may_be_launched(call):
    for launch in launches.of(*call):
        x, *others = launch.programs
        assert 1 <= x < 1 << 31 and all(1 <= each < 1 << 16 for each in others), (launch.name, launch.grid)


def test_calls_beyond_that_are_refused():
    image, weight = meta(1, 1, 1 << 15, 1 << 14), meta(1, 1, 2, 2)
    assert "pixels" in _why_not_image(image, weight) and _why_not_image(image[:, :, 1:], weight) is None
    x = meta(1, 2, 2, 4 * MAX_TRITON_WIDTH)
    assert "more than" in _why_not_triton_kernel(x, 2) and _why_not_triton_kernel(x, 4) is None


@pytest.mark.skipif(not triton_support.INTERPRET, reason="programs run in the interpreter")
@pytest.mark.parametrize("name", FAR)
def test_offsets_beyond_the_range_of_32_bits(name, monkeypatch):
    many_splits(monkeypatch)
    for call in FAR[name]:
        for launch in launches.of(*call):
            launches.run(launch, launch.last)
