"""The registered operators, called directly with operands that the public functions would not pass on."""

import pytest
import torch

import tokenfusion
from tokenfusion.kernels import extension

X, WEIGHT = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 2, 2)
ON_GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not extension.build_info()["cuda"]["built"], reason="built without CUDA kernels")
)


def call(name: str, backend: str, *arguments):
    """The backend's operator, whatever device the tensors are on: that of CUDA checks them before it needs a GPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[backend.upper()])
    return getattr(torch.ops.tokenfusion, f"{name}_{backend}").default.redispatch(keys, *arguments)


def upconv(backend, **changes):
    given = dict(x=X, weight=WEIGHT, bias=None, skip=None) | changes
    return call("upconv_concat", backend, *given.values(), False, False)


def upconv_backward(backend, **changes):
    given = dict(grad_up=torch.randn(2, 4, 8, 10), x=X, weight=WEIGHT) | changes
    return call("upconv_concat_backward", backend, *given.values(), [True] * 3)


def upconv_add(backend, **changes):
    given = dict(x=X, weight=WEIGHT, bias=None, skip=torch.randn(2, 4, 8, 10), proj_up=None, proj_skip=None) | changes
    return call("upconv_concat_project", backend, *given.values(), False)


def upconv_add_backward(backend, **changes):
    given = dict(grad_out=torch.randn(2, 4, 8, 10), x=X, weight=WEIGHT, skip=None, proj_up=None, proj_skip=None)
    given |= dict(needed=[True] * 3 + [False] * 3) | changes
    return call("upconv_concat_project_backward", backend, *given.values())


def ffn(backend, **changes):
    given = dict(x=torch.randn(5, 8), weight=torch.randn(16, 8), bias_in=torch.randn(16), bias_out=None) | changes
    return call("tied_ffn", backend, *given.values(), "gelu", False)


def ffn_backward(backend, **changes):
    given = dict(grad_y=torch.randn(5, 8), x=torch.randn(5, 8), weight=torch.randn(16, 8), bias_in=torch.randn(16))
    given |= dict(hidden=torch.empty(0)) | changes
    return call("tied_ffn_backward", backend, *given.values(), "gelu", [True] * 4)


MIXING = dict(x=(2, 4, 3, 8), compressed=(2, 4, 3, 4), generate_weight=(16, 8), generate_bias=(16,))


def mixing(backend, **changes):
    given = {name: torch.randn(shape) for name, shape in MIXING.items()} | changes
    return call("dynamic_mixing", backend, *given.values(), 2, 1, False)


def mixing_backward(backend, **changes):
    sizes = dict(grad_mixed=(2, 4, 3, 8), grad_mean=(2, 8)) | MIXING
    given = {name: torch.randn(shape) for name, shape in sizes.items()} | changes
    return call("dynamic_mixing_backward", backend, *given.values(), 2, 1, [True] * 4)


ATTENTION = dict(query=(2, 3, 16), tokens=(2, 9, 16), extra_token=(2, 16))


def attention(backend, **changes):
    given = {name: torch.randn(shape) for name, shape in ATTENTION.items()} | dict(lengths=None, offsets=None) | changes
    return call("single_query_attention", backend, *given.values(), False, 1e-6)


def attention_backward(backend, **changes):
    results = dict(context=(2, 3, 16), log_sum_exp=(2, 3))
    sizes = dict(grad_context=(2, 3, 16)) | ATTENTION | dict(lengths=None, offsets=None) | results
    given = {name: None if shape is None else torch.randn(shape) for name, shape in sizes.items()} | changes
    return call("single_query_attention_backward", backend, *given.values(), False, 1e-6, [True] * 3)


def packed(offsets, **changes):
    return dict(tokens=torch.randn(1, 9, 16), offsets=torch.tensor(offsets)) | changes


ON_BOTH = (
    *(upconv, upconv_backward, upconv_add, upconv_add_backward),
    *(ffn, ffn_backward, mixing, mixing_backward, attention, attention_backward),
)


@pytest.mark.parametrize("operator", ON_BOTH)
def test_what_is_right_runs(operator):
    operator("cpu")


BAGS = [dict(lengths=torch.tensor([1, 2])), packed([0, 3, 9])]


@pytest.mark.parametrize("backend", [ON_GPU])
@pytest.mark.parametrize(
    "operator, changes",
    [*((each, {}) for each in ON_BOTH), *((each, bags) for each in (attention, attention_backward) for bags in BAGS)],
)
def test_what_is_right_for_a_gpu_fails_for_want_of_it_alone(operator, changes, backend):
    with pytest.raises(RuntimeError, match="CUDA") as caught:
        operator(backend, **changes)
    assert type(caught.value) is RuntimeError and "got" not in str(caught.value)


@pytest.mark.parametrize(
    "operator, changes",
    [
        (attention, dict(lengths=torch.tensor([3, 10]))),
        (attention, dict(lengths=torch.tensor([-1, 3]))),
        (attention_backward, dict(lengths=torch.tensor([3, 10]))),
        (attention, packed([0, 3, 10])),
        (attention, packed([-1, 3, 9])),
        (attention, packed([0, 5, 4])),
        (attention, packed([5, 4, 9])),
        (attention, packed([0, 3, 9], lengths=torch.tensor([4, 1]))),
        (attention, packed([0, 3, 9], lengths=torch.tensor([-1, 1]))),
        (attention_backward, packed([0, 3, 10])),
        (attention_backward, packed([0, 3, 9], lengths=torch.tensor([4, 1]))),
    ],
)
def test_what_is_too_short_or_of_another_dtype_is_an_error(operator, changes):
    with pytest.raises((ValueError, TypeError), match="expected"):
        operator("cpu", **changes)


@pytest.mark.parametrize("backend", ["cpu", ON_GPU])
@pytest.mark.parametrize(
    "operator, changes",
    [
        (upconv, dict(bias=torch.randn(3))),
        (upconv, dict(bias=torch.randn(4).double())),
        (upconv, dict(weight=torch.randn(3, 4, 3, 3))),
        (upconv, dict(weight=torch.randn(3, 4, 0, 0))),
        (upconv, dict(skip=torch.randn(2, 1, 8, 9))),
        (upconv, dict(bias=torch.randn(4, device="meta"))),
        (upconv_backward, dict(grad_up=torch.randn(2, 4, 8, 8))),
        (upconv_backward, dict(grad_up=torch.randn(2, 4, 8, 10).double())),
        (upconv_backward, dict(weight=torch.randn(2, 4, 2, 2))),
        (upconv_add, dict(bias=torch.randn(3))),
        (upconv_add, dict(skip=torch.randn(2, 3, 8, 10))),
        (upconv_add, dict(proj_up=torch.randn(5, 3))),
        (upconv_add, dict(proj_skip=torch.randn(4, 3))),
        (upconv_add_backward, dict(grad_out=torch.randn(2, 3, 8, 10))),
        (upconv_add_backward, dict(skip=torch.randn(2, 4, 8, 10, device="meta"))),
        (ffn, dict(bias_in=torch.randn(15))),
        (ffn, dict(bias_out=torch.randn(8, device="meta"))),
        (ffn, dict(weight=torch.randn(16, 8).double())),
        (ffn, dict(weight=torch.randn(0, 8), bias_in=None)),
        (ffn, dict(weight=torch.randn(16))),
        (ffn, dict(x=torch.randn(5, 7))),
        (ffn, dict(x=torch.randn(()))),
        (ffn_backward, dict(bias_in=torch.randn(15))),
        (ffn_backward, dict(grad_y=torch.randn(4, 8))),
        (ffn_backward, dict(grad_y=torch.randn(5, 8).double())),
        (ffn_backward, dict(hidden=torch.randn(5, 15))),
        (ffn_backward, dict(hidden=torch.randn(5, 16).bfloat16())),
        (ffn_backward, dict(hidden=torch.randn(5, 16, device="meta"))),
        (mixing, dict(generate_bias=torch.randn(15))),
        (mixing, dict(generate_weight=torch.randn(16, 7))),
        (mixing, dict(compressed=torch.randn(2, 4, 2, 4))),
        (mixing, dict(compressed=torch.randn(2, 4, 3, 3))),
        (mixing, dict(generate_bias=torch.randn(16).bfloat16())),
        (mixing, dict(generate_bias=torch.randn(16, device="meta"))),
        (mixing, dict(x=torch.randn(2, 4, 24))),
        (mixing, dict(x=torch.randn(2, 4, 8, 3).mT)),
        (mixing, dict(x=torch.randn(2, 4, 3, 8).int())),
        (mixing_backward, dict(grad_mixed=torch.randn(2, 4, 3, 7))),
        (mixing_backward, dict(grad_mean=torch.randn(2, 4))),
        (mixing_backward, dict(grad_mean=torch.randn(2, 8).double())),
        (mixing_backward, dict(generate_weight=torch.randn(16, 7))),
        (attention, dict(query=torch.randn(1, 3, 16))),
        (attention, dict(query=torch.randn(2, 3, 16).double())),
        (attention, dict(query=torch.randn(2, 3, 16, device="meta"))),
        (attention, dict(extra_token=torch.randn(2, 7))),
        (attention, dict(tokens=torch.randn(2, 16))),
        (attention, dict(tokens=torch.randn(2, 0, 16))),
        (attention, dict(lengths=torch.tensor([1, 2, 3]))),
        (attention, dict(lengths=torch.tensor([1.0, 2.0]))),
        (attention, dict(lengths=torch.tensor([1, 2], device="meta"))),
        (attention_backward, dict(lengths=torch.tensor([[1, 2]]))),
        (attention, packed([0, 9])),
        (attention, packed([0.0, 3.0, 9.0])),
        (attention, packed([0, 3, 9], tokens=torch.randn(2, 9, 16))),
        (attention, packed([0, 3, 9], lengths=torch.tensor([1, 2, 3]))),
        (attention_backward, packed([[0, 3, 9]])),
        (attention_backward, dict(grad_context=torch.randn(2, 2, 16))),
        (attention_backward, dict(context=torch.randn(2, 3, 16).bfloat16())),
        (attention_backward, dict(log_sum_exp=torch.randn(2, 2))),
        (attention_backward, dict(log_sum_exp=torch.randn(2, 3).double())),
    ],
)
def test_what_does_not_fit_is_an_error_on_every_device(operator, changes, backend):
    with pytest.raises((ValueError, TypeError), match="expected"):
        operator(backend, **changes)


@pytest.mark.parametrize("name", ["skip", "x"])
def test_odd_strides_of_sizes_of_one(name):
    """They describe the same elements, and is_contiguous says so."""
    given = dict(x=torch.randn(4, 48, 1, 1), skip=torch.randn(4, 16, 2, 2).to(memory_format=torch.channels_last))
    if name == "x":
        given["x"] = given["x"].as_strided((4, 48, 1, 1), (48, 1, 48, 1))
    weight, bias = torch.randn(48, 16, 2, 2), torch.randn(16)
    with tokenfusion.backend("cpu"):
        got = tokenfusion.kernels.upconv_concat(given["x"], weight, bias, given["skip"])
    with tokenfusion.backend("reference"):
        expected = tokenfusion.kernels.upconv_concat(given["x"].clone(), weight, bias, given["skip"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
