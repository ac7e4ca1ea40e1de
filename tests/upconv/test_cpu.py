"""The C++ kernels of the up-convolutions against the reference."""

import itertools
from functools import partial

import pytest
import torch

from tests.gradients import check_frozen, check_repeats, with_gradients
from tests.parity import assert_parity, assert_runs
from tests.upconv.cases import FORMATS, OPS, UNIFORM, check, make_inputs
from tokenfusion.kernels import upconv_concat, upconv_concat_project
from tokenfusion.kernels.upconv import reference
from tokenfusion.kernels.upconv.project import op as project_op
from tokenfusion.kernels.upconv.reference import projected_sum_as_products, upconv_projected_sum
from tokenfusion.measure import peak_extra_bytes

pytestmark = pytest.mark.backend("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SCALES = (2, 4, 8, 16, 32)
MIXED = [tuple(formats) for formats in itertools.product(FORMATS, repeat=4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("op", OPS)
def test_every_scale(op, scale, formats, dtype):
    for size in ((1, 1), (2, 33)) if scale < 16 else ((1, 3),):
        check(op, make_inputs(op, size=size, scale=scale, dtype=dtype, formats=formats))


@pytest.mark.parametrize("formats", MIXED, ids="-".join)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels, projected", [((6, 5, 7), 6), ((6, 32, 7), 64)])
def test_mixed_formats(channels, projected, op, formats):
    """Of as many pixels as our own product wants, which takes the second channels."""
    check(op, make_inputs(op, batch=8, channels=channels, projected=projected, size=(3, 5), formats=formats))


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        dict(batch=1, channels=(1, 1, 1), size=(1, 1)),
        dict(batch=17, channels=(33, 65, 31), size=(7, 7)),
        dict(batch=2, channels=(8, 300, 40), size=(5, 61)),
        dict(batch=1, channels=(4, 2, 3), size=(301, 23)),
        dict(batch=2, channels=(16, 70, 5), size=(9, 130), scale=4),
        dict(batch=3, channels=(33, 64, 31), size=(7, 7), projected=64),  # what our own product takes
        dict(batch=2, channels=(50, 96, 40), size=(3, 131), projected=32),
        dict(batch=3, channels=(20, 32, 3), size=(5, 9), scale=4, projected=32, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_odd_sizes_and_several_blocks(op, case, formats):
    check(op, make_inputs(op, formats=formats, **case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("op", ["concat", "project"])
def test_bias_and_skip(op, skip_first, skip, bias, formats, dtype):
    check(op, make_inputs(op, channels=(5, 3, skip), bias=bias, formats=formats, dtype=dtype), skip_first=skip_first)


def _projected(*tensors):
    return upconv_concat_project(*tensors, torch.ones(5, 3), None)


@pytest.mark.parametrize("joined", [upconv_concat, _projected])
def test_a_skip_without_channels(joined):
    x, weight, none = torch.randn(2, 6, 4, 4), torch.randn(6, 3, 2, 2), torch.empty(2, 0, 8, 8, requires_grad=True)
    out = joined(x, weight, None, none)
    torch.testing.assert_close(out, joined(x, weight, None, None), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert none.grad.shape == none.shape


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projected", [6, 64])
@pytest.mark.parametrize("composes", [False, True])
def test_both_orders_of_the_projection(composes, projected, dtype, formats, monkeypatch):
    monkeypatch.setattr(project_op, "_composing_pays", lambda *_: composes)
    check("project", make_inputs("project", size=(8, 9), projected=projected, formats=formats, dtype=dtype))


def test_composing_is_chosen_by_the_work():
    weight, few, many = torch.empty(64, 32, 2, 2), torch.empty(1, 64, 2, 2), torch.empty(8, 64, 32, 32)
    proj_up = torch.empty(32, 32)
    assert not project_op._composing_pays(few, weight, proj_up)
    assert project_op._composing_pays(many, weight, proj_up)
    x, weight, proj_up = torch.empty(16, 768, 7, 7), torch.empty(768, 768, 2, 2), torch.empty(768, 768)
    assert not project_op._composing_pays(x, weight, proj_up)
    assert project_op._composing_pays(x, weight, proj_up.requires_grad_())


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("skip_first", [False, True])
def test_out(skip_first, formats):
    x, weight, bias, skip, _ = (t.detach() for t in make_inputs(formats=formats))
    expected = upconv_concat(x, weight, bias, skip, skip_first=skip_first)
    wide = torch.full((2, 11, 6, 10), torch.nan).contiguous(memory_format=FORMATS[formats[0]])
    out = wide[:, 2:9]
    with assert_runs("upconv_concat_out_cpu"):
        assert upconv_concat(x, weight, bias, skip, skip_first=skip_first, out=out) is out
    assert torch.equal(out, expected)
    assert wide[:, :2].isnan().all() and wide[:, 9:].isnan().all()
    again = out.clone()
    again.narrow(1, 4 if skip_first else 0, 3).fill_(torch.nan)
    written = again.narrow(1, 0 if skip_first else 3, 4)  # where the encoder wrote
    upconv_concat(x, weight, bias, written, skip_first=skip_first, out=again)
    assert torch.equal(again, expected)


def test_the_result_is_channels_last_where_the_inputs_are():
    for formats in MIXED:
        x, weight, bias, skip, _ = make_inputs(size=(2, 2), formats=formats)
        out = upconv_concat(x, weight, bias, skip)
        want = torch.channels_last if formats[0] == formats[2] == "nhwc" else torch.contiguous_format
        assert out.is_contiguous(memory_format=want)
    x, weight, bias, skip, _ = make_inputs(size=(1, 1), formats=("nchw", "nchw", "nhwc", "nchw"))
    assert upconv_concat(x, weight, bias, skip).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPS)
def test_slices_and_expanded_gradients(op):
    *tensors, grad = make_inputs(op, size=(4, 6))

    def inside(t):
        if t is None or t.dim() < 2:
            return t
        wide = torch.full([s + 3 for s in t.shape], torch.nan)
        view = wide[tuple(slice(1, 1 + s) for s in t.shape)]
        view.copy_(t.detach())
        return view.requires_grad_()

    got = with_gradients(OPS[op][0], (*map(inside, tensors), inside(grad).detach()))
    want = with_gradients(OPS[op][0], (*tensors, grad))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    ones = torch.ones(()).expand(grad.shape)
    got, want = (with_gradients(OPS[op][0], (*tensors, g)) for g in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", OPS)
def test_frozen_inputs(op, formats):
    inputs = make_inputs(op, formats=formats)
    check_frozen(OPS[op][0], inputs, *({i} for i in range(len(inputs) - 1)))


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op, formats):
    inputs = make_inputs(op, batch=0, formats=formats)
    out, *grads = with_gradients(OPS[op][0], inputs)
    assert out.shape == inputs[-1].shape
    assert [g.shape for g in grads] == [t.shape for t in inputs[:-1]]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", OPS)
def test_the_same_call_gives_the_same_bits(op, formats):
    inputs = make_inputs(op, batch=3, channels=(16, 24, 8), size=(9, 11), formats=formats)
    check_repeats(OPS[op][0], inputs)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("channels, projected", [((16, 40, 8), 6), ((16, 32, 8), 64)])
def test_any_number_of_threads(channels, projected, formats, threads, set_threads):
    """Blocks go beyond the end of an image, or do not, where only a part of the images is taken."""
    set_threads(threads)
    for op in ("concat", "project"):
        *tensors, grad = make_inputs(op, 3, channels, (7, 9), projected=projected, formats=formats)
        check(op, (*tensors, grad))
        apart = [t.detach()[::2] if t is not None and t.dim() == 4 and len(t) == 3 else t for t in (*tensors, grad)]
        check(op, [None if t is None else t.detach().requires_grad_() for t in apart[:-1]] + apart[-1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "skip"])
def test_nan_and_inf_propagate_as_in_the_reference(value, where):
    x, weight, bias, skip, _ = (t.detach() for t in make_inputs())
    {"x": x, "skip": skip}[where][1, 2, 1, 3] = value
    torch.testing.assert_close(
        upconv_concat(x, weight, bias, skip), reference.upconv_concat(x, weight, bias, skip), equal_nan=True
    )


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_first_and_second_order(op, formats):
    inputs = make_inputs(
        op, batch=2, channels=(3, 2, 2), size=(2, 3), projected=2, dtype=torch.float64, formats=formats
    )
    assert torch.autograd.gradcheck(OPS[op][0], inputs[:-1])
    assert torch.autograd.gradgradcheck(OPS[op][0], inputs[:-1])


@pytest.mark.parametrize("op, dynamic, formats", [("concat", True, UNIFORM[0]), ("project", False, UNIFORM[1])])
def test_compiled(op, dynamic, formats):
    compiled = torch.compile(OPS[op][0], fullgraph=True, dynamic=dynamic)
    inputs = make_inputs(op, formats=formats)
    for got, want in zip(with_gradients(compiled, inputs), with_gradients(OPS[op][0], inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_opcheck(formats):
    *tensors, grad = make_inputs(formats=formats)
    x, weight, bias, skip = tensors
    channels_last = formats[0] == "nhwc"
    ops = torch.ops.tokenfusion
    torch.library.opcheck(ops.upconv_concat_cpu, (x, weight, bias, skip, True, channels_last))
    torch.library.opcheck(ops.upconv_concat_backward_cpu, (grad[:, 4:], x, weight, [True, True, True]))
    out = torch.empty_like(grad)
    torch.library.opcheck(ops.upconv_concat_out_cpu, (*(t.detach() for t in tensors), False, out))
    *tensors, grad = make_inputs("project", formats=formats)
    x, weight, bias, skip, proj_weight, _ = tensors
    proj_up, proj_skip = (t.detach().requires_grad_() for t in proj_weight.split((3, 4), 1))
    new_bias = torch.randn(6, requires_grad=True)
    torch.library.opcheck(ops.upconv_concat_project_cpu, (x, weight, new_bias, skip, proj_up, proj_skip, channels_last))
    arguments = (grad, x, weight, skip, proj_up, proj_skip, [True] * 6)
    torch.library.opcheck(ops.upconv_concat_project_backward_cpu, arguments)


@pytest.mark.parametrize("op", OPS)
def test_autocast(op):
    inputs = make_inputs(op, channels=(16, 16, 16))
    function, definition = OPS[op]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = function(*inputs[:-1]), definition(*(t.bfloat16() for t in inputs[:-1]))
    assert got.dtype == torch.bfloat16
    assert_parity(got, want, definition(*(t.bfloat16().double() for t in inputs[:-1])))


def test_sum_form_is_what_the_kernels_compute():
    x, weight, bias, skip, proj_weight, proj_bias, _ = make_inputs("project", dtype=torch.float64)
    arguments = x, weight, proj_weight[:, :3] @ bias + proj_bias, skip, proj_weight[:, :3], proj_weight[:, 3:]
    want = upconv_concat_project(x, weight, bias, skip, proj_weight, proj_bias)
    for form in (upconv_projected_sum, projected_sum_as_products):
        torch.testing.assert_close(form(*arguments), want)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_no_up_sampled_map_and_no_concatenation(formats):
    """Beyond results: tiles, and matrices of the size of x and of the weight, are all that is allocated."""
    up = 64 * 256 * 256 * 4
    for op in ("concat", "project"):
        function, inputs = OPS[op][0], make_inputs(op, 1, (16, 64, 64), (128, 128), projected=8, formats=formats)
        out = inputs[-1].nbytes
        with torch.no_grad():
            assert peak_extra_bytes(partial(function, *inputs[:-1])) < out + up / 2
        gradients = sum(t.nbytes for t in inputs[:-1])
        if op == "concat":
            gradients -= inputs[3].nbytes  # a slice of the gradient that came in
        assert peak_extra_bytes(partial(with_gradients, function, inputs)) < out + gradients + up / 2
