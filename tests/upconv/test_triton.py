"""The Triton kernels of the up-convolutions against the reference, in Triton's interpreter or on a GPU."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.interpreter import DEVICE, DTYPES
from tests.upconv import cases
from tests.upconv.cases import MIXED, OPS, UNIFORM, check, check_frozen_inputs_and_empty_batch, check_out_and_its_slice
from tokenfusion.kernels import upconv_concat
from tokenfusion.kernels.upconv.project import op as project_op

pytestmark = pytest.mark.backend("triton")

make_inputs = functools.partial(cases.make_inputs, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM + MIXED, ids="-".join)
@pytest.mark.parametrize("op", OPS)
def test_formats(op, formats, dtype):
    check(op, make_inputs(op, size=(3, 5), formats=formats, dtype=dtype))


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize(
    "op, scale", [("concat", 4), ("concat", 8), ("concat", 16), ("concat", 32), ("project", 8), ("add", 4)]
)
def test_every_scale(op, scale, formats):
    channels = (3, 1, 1) if scale > 8 else (3, 2, 1)
    check(op, make_inputs(op, batch=1, channels=channels, size=(1, 1), scale=scale, projected=2, formats=formats))


@pytest.mark.parametrize("op", OPS)
def test_several_tiles_and_splits(op):
    check(op, make_inputs(op, batch=2, channels=(66, 33, 5), size=(7, 7), projected=130))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("op", ["concat", "project"])
def test_bias_and_skip(op, skip_first, skip, bias):
    check(op, make_inputs(op, channels=(5, 3, skip), bias=bias), skip_first=skip_first)


@pytest.mark.parametrize("composes", [False, True])
def test_both_orders_of_the_projection(composes, monkeypatch):
    monkeypatch.setattr(project_op, "_composing_pays", lambda *_: composes)
    check("project", make_inputs("project"))


@pytest.mark.parametrize("op", OPS)
def test_frozen_inputs_and_empty_batch(op):
    check_frozen_inputs_and_empty_batch(op, DEVICE)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_out_and_its_slice(formats):
    check_out_and_its_slice(make_inputs(formats=formats), "triton")


def test_elements_beyond_the_range_of_32_bits():
    far = 2**31 + 64
    x, weight, bias, skip, _ = (t.detach() for t in make_inputs(dtype=torch.float16))
    memory = torch.empty(0, dtype=torch.float16, device=DEVICE)
    memory.untyped_storage().resize_(4 * (far + 1024))  # pages that nobody touches take no memory
    distant = memory.as_strided(x.shape, (far, *x.stride()[1:]))
    distant.copy_(x)
    assert torch.equal(upconv_concat(distant, weight, bias, skip), upconv_concat(x, weight, bias, skip))


def test_opcheck():
    (x, weight, bias, skip), grad = make_inputs()[:4], make_inputs()[4]
    ops = torch.ops.tokenfusion
    torch.library.opcheck(ops.upconv_concat_triton, (x, weight, bias, skip, True, False))
    torch.library.opcheck(ops.upconv_concat_backward_triton, (grad[:, 4:], x, weight, [True, True, True]))
