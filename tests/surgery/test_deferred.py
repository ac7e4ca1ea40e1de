"""The result of a fused up-convolution is, in every use, what the plain one gives."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import dlpack

import tokenfusion
from tests.deferred import check, fused_copy, inputs, upconv
from tests.parity import assert_runs

pytestmark = pytest.mark.usefixtures("within_a_model")


def cat(up, x, skip):
    return torch.cat((up(x), skip), 1)


def meta_tensor(x: torch.Tensor) -> torch.Tensor:
    return pytest.importorskip("monai.data").MetaTensor(x)


def then(use):
    """A use of the result after its concatenation, and one of it before."""

    def before(up, x, skip):
        y = up(x)
        used = use(y)
        return torch.cat((y, skip), 1), *used

    def after(up, x, skip):
        y = up(x)
        joined = torch.cat((skip, y), 1)
        return joined, *use(y)

    return before, after


CONCATENATIONS = {
    "first": cat,
    "second": lambda up, x, skip: torch.cat([skip, up(x)], 1),
    "dim -3": lambda up, x, skip: torch.cat((up(x), skip), dim=-3),
    "concat": lambda up, x, skip: torch.concat((up(x), skip), 1),
    "concatenate": lambda up, x, skip: torch.concatenate((up(x), skip), 1),
    "keywords": lambda up, x, skip: torch.cat(dim=1, tensors=(up(x), skip)),
    "axis": lambda up, x, skip: torch.concatenate([skip, up(x)], axis=1),
    "parameter": lambda up, x, skip: torch.cat((up(x), nn.Parameter(skip.detach())), 1),
    "constant skip": lambda up, x, skip: torch.cat((up(x), skip.detach()), 1),
    "constant input": lambda up, x, skip: torch.cat((up(x.detach()), skip), 1),
    "strided skip": lambda up, x, skip: torch.cat((up(x), skip.repeat(1, 2, 1, 2)[:, ::2, :, ::2]), 1),
    "strided input": lambda up, x, skip: torch.cat((up(x.repeat(1, 1, 1, 2)[..., ::2]), skip), 1),
    "expanded input": lambda up, x, skip: torch.cat((up(x[:1].expand(2, -1, -1, -1)), skip), 1),
    "the same skip twice": lambda up, x, skip: (torch.cat((up(x), skip), 1), torch.cat((skip, up(x)), 1)),
    "shared input": lambda up, x, skip: [torch.cat((y, skip), 1) for y in (up(x), up(x))],
    "padded by nothing": lambda up, x, skip: torch.cat((skip, F.pad(up(x), [0, 0, 0, 0])), 1),
    "padded by zero tensors": lambda up, x, skip: torch.cat((skip, F.pad(up(x), [torch.tensor([0])] * 4)), 1),
    "replicated by nothing": lambda up, x, skip: torch.cat((skip, F.pad(up(x), [0, 0, 0, 0], "replicate")), 1),
    "padded twice": lambda up, x, skip: torch.cat((F.pad(F.pad(up(x), (0, 0, 0, 0)), (0, 0, 0, 0), value=3), skip), 1),
    "one result in two": lambda up, x, skip: [torch.cat((y, s), 1) for y in (up(x),) for s in (skip, skip * 2)],
}


@pytest.mark.parametrize("use", CONCATENATIONS.values(), ids=CONCATENATIONS)
def test_concatenations_that_run_as_one_operator(use):
    check(use)


def padding_of_a_changed_result(up, x, skip):
    y = up(x)
    padded = F.pad(y, (0, 0, 0, 0))
    y.mul_(2)
    joined = torch.cat((padded, skip), 1)
    padded.add_(1)
    return joined, y, padded


OTHERS = {
    "dim 0": lambda up, x, skip: torch.cat((up(x), skip[:, :1].expand(-1, 4, -1, -1)), 0),
    "dim 2": lambda up, x, skip: torch.cat((up(x), skip[:, :1].expand(-1, 4, -1, -1)), 2),
    "no dim": lambda up, x, skip: torch.cat((up(x), skip[:, :1].expand(-1, 4, -1, -1))),
    "three": lambda up, x, skip: torch.cat((up(x), skip, skip), 1),
    "one": lambda up, x, skip: torch.cat((up(x),), 1),
    "both deferred": lambda up, x, skip: torch.cat((up(x), up(x * 2)), 1),
    "twice the same": lambda up, x, skip: torch.cat([up(x)] * 2, 1),
    "out": lambda up, x, skip: torch.cat((up(x).detach(), skip.detach()), 1, out=torch.empty(2, 7, 6, 10)),
    "empty skip": lambda up, x, skip: torch.cat((up(x), skip[:, :0]), 1),
    "legacy empty skip": lambda up, x, skip: torch.cat((up(x), torch.empty(0)), 1),
    "other dtype": lambda up, x, skip: torch.cat((up(x), skip.double()), 1),
    "integers": lambda up, x, skip: torch.cat((up(x), (skip * 9).long()), 1),
    "padded": lambda up, x, skip: torch.cat((F.pad(up(x), (0, 1, 0, 0)), F.pad(skip, (0, 1, 0, 0))), 1),
    "padded by two numbers": lambda up, x, skip: torch.cat((F.pad(up(x), (0, 0)), skip), 1),
    "vstack": lambda up, x, skip: torch.vstack((up(x), up(x))),
    "stack": lambda up, x, skip: torch.stack((up(x), up(x)), 1),
    "arithmetic": lambda up, x, skip: (2 - up(x) / 3, up(x) @ skip[:, :1].mT),
    "comparison": lambda up, x, skip: (up(x) > 0).float() * skip[:, :1],
    "indexing": lambda up, x, skip: (up(x)[0, ..., 1:], up(x)[:, [0, 2]], up(x)[up(x) > 0]),
    "iteration": lambda up, x, skip: list(up(x)),
    "attributes": lambda up, x, skip: (up(x).mT, up(x).data, up(x).real),
    "layers": lambda up, x, skip: F.relu(F.batch_norm(F.conv2d(up(x), x[:2, :4, :3, :3]), None, None, training=True)),
    "interpolation": lambda up, x, skip: F.interpolate(up(x), size=(7, 11), mode="bilinear"),
    "randomness": lambda up, x, skip: (F.dropout(up(x), 0.5), torch.rand_like(up(x)), torch.bernoulli(up(x).sigmoid())),
    "returned": lambda up, x, skip: up(x),
    "never used": lambda up, x, skip: (up(x), skip * 2)[1],
    "in place": lambda up, x, skip: up(x).mul_(2).add_(1),
    "in place by a function": lambda up, x, skip: F.relu(up(x), inplace=True),
    "in place by out": lambda up, x, skip: torch.add(x[:1, :1, :1, :1].detach(), 1, out=up(x).detach()),
    "cast": lambda up, x, skip: (up(x).double(), up(x).half().float(), up(x).to("cpu"), up(x).contiguous()),
    "tensor()": lambda up, x, skip: torch.as_tensor(up(x)),
    "copy_": lambda up, x, skip: torch.zeros(2, 4, 6, 10).copy_(up(x)),
    "assignment": lambda up, x, skip: torch.zeros(2, 8, 6, 10).index_copy(1, torch.arange(4), up(x)),
    "numpy": lambda up, x, skip: torch.from_numpy(np.asarray(up(x).detach()) * 2),
    "dlpack": lambda up, x, skip: dlpack.from_dlpack(up(x).detach()),
    "list": lambda up, x, skip: torch.tensor(up(x).tolist()),
    "scripted": lambda up, x, skip: scripted(up(x), skip),
    "jit.fork": lambda up, x, skip: torch.jit.wait(torch.jit.fork(scripted, up(x), skip)),
    "C++ operator": lambda up, x, skip: torch.ops.aten.cat([up(x), skip], 1),
    "_foreach": lambda up, x, skip: torch._foreach_mul([up(x), skip], 2),
    "einsum": lambda up, x, skip: torch.einsum("bchw,bdhw->bcd", up(x), skip),
    "nested": lambda up, x, skip: torch.nested.nested_tensor([up(x)[0].detach()]).to_padded_tensor(0.0),
    "tensor subclass": lambda up, x, skip: torch.cat((up(x), meta_tensor(skip)), 1).as_tensor(),
    "parameter of it": lambda up, x, skip: nn.Parameter(up(x).detach()) * 2,
    "pickled": lambda up, x, skip: pickle.loads(pickle.dumps(up(x).detach())),
    "copied": lambda up, x, skip: (copy.copy(up(x)), copy.deepcopy(up(x).detach())),
    "saved": lambda up, x, skip: saved(up(x)),
    "padding of a changed result": padding_of_a_changed_result,
}


@torch.jit.script
def scripted(x, y):
    return torch.cat((x, y), 1) * 2


def saved(result):
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("use", OTHERS.values(), ids=OTHERS)
def test_everything_else_computes(use):
    check(use, runs=None if use is padding_of_a_changed_result else False)


USES = {
    "product": lambda y: [y * 2],
    "view changed in place": lambda y: [y[:, 1:].mul_(3), y],
    "changed in place": lambda y: [y.mul_(3), y],
    "changed data": lambda y: [y.data.zero_(), y],
    "changed without recording": lambda y: [torch.no_grad()(y.add_)(1), y],
    "auxiliary loss": lambda y: [y.square().mean()],
    "kept": lambda y: [y],
    "detached": lambda y: [y.detach()],
    "numbers": lambda y: [torch.tensor(y.mean().item()), torch.tensor(y.shape), torch.tensor(y.is_contiguous())],
    "asked for strides": lambda y: [torch.tensor(y.stride()), torch.tensor(y.data_ptr() == y.data_ptr())],
    "set": lambda y: [y.__setitem__((0, 0), 1), y][1:],
    "text": lambda y: [torch.tensor(len(str(y.detach()))), torch.tensor(len(y)), torch.tensor(y.numel() + y.ndim)],
}


@pytest.mark.parametrize("order", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_used_before_and_after_the_concatenation(use, order):
    check(then(use)[order], runs=None)


def test_a_result_is_computed_once():
    up, (x, _) = fused_copy(upconv()), inputs()
    y = up(x)
    with torch.autograd.profiler.profile() as profile:
        assert (y + 1).shape == (y * y.exp()).shape
    assert [e.name for e in profile.function_events].count("aten::conv_transpose2d") == 1
    assert y.data_ptr() == y.data_ptr()


def test_what_is_known_computes_nothing():
    y = fused_copy(upconv())(inputs()[0])
    with torch.autograd.profiler.profile() as profile:
        known = (*y.shape, *y.size(), y.size(1), y.dim(), y.ndim, y.dtype, y.device, y.numel(), len(y), y.requires_grad)
        assert y.is_floating_point() and y.grad_fn is not None and isinstance(y, torch.Tensor) and torch.is_tensor(y)
    assert known == (2, 4, 6, 10, 2, 4, 6, 10, 4, 4, 4, torch.float32, torch.device("cpu"), 480, 2, True)
    assert not [e.name for e in profile.function_events if "conv" in e.name]


RESHAPES = {
    "squeeze_": lambda y: y.squeeze_(),
    "unsqueeze_": lambda y: y.unsqueeze_(0),
    "transpose_": lambda y: y.transpose_(1, 2),
    "swapdims_": lambda y: y.swapdims_(0, 1),
    "other data": lambda y: setattr(y, "data", y.data[:, :, ::2].double()),
    "resize_": lambda y: y.detach_().resize_(5, 7),
    "resize_as_": lambda y: y.detach_().resize_as_(torch.empty(3)),
}


def facts(y):
    flags = y.is_floating_point(), y.is_complex(), y.requires_grad, y.is_leaf
    return y.shape, y.size(), y.size(0), y.dim(), y.ndim, len(y), y.numel(), y.nelement(), y.dtype, *flags


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("reshape", RESHAPES.values(), ids=RESHAPES)
def test_a_result_given_another_shape_in_place(reshape, mode, asked):
    found = []
    for up in (upconv(), fused_copy(upconv())):
        with mode():
            y = up(inputs()[0][:1])
            if asked:
                y.sum()
            reshape(y)
            found.append(facts(y))
    assert found[0] == found[1]


@torch.no_grad()
def test_a_result_given_other_memory_by_cpp():
    found = []
    for up in (upconv(), fused_copy(upconv())):
        y = up(inputs()[0])
        y.set_(torch.zeros(5))
        found.append(facts(y))
    assert found[0] == found[1]


def test_a_loss_of_a_result_given_another_shape_in_place():
    def use(up, x, skip):
        y = up(x[:1])
        y.squeeze_(0).transpose_(0, 2)
        return F.binary_cross_entropy_with_logits(y, torch.ones(y.shape)), torch.cat(
            (y.mT, skip[0].permute(2, 0, 1)), 1
        )

    check(use, runs=False)


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("skip_channels, out_channels", [(3, 4), (1, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 5)])
def test_memory_formats(skip_channels, out_channels, size):
    for in_channels in (1, 6):
        for formats in [(a, b, c) for a in FORMATS for b in FORMATS for c in FORMATS]:
            up = nn.ConvTranspose2d(in_channels, out_channels, 2, 2).to(memory_format=formats[0])
            x = torch.randn(2, in_channels, *size).to(memory_format=formats[1])
            skip = torch.randn(2, skip_channels, 2 * size[0], 2 * size[1]).to(memory_format=formats[2])
            check(lambda up, x, skip: (cat(up, x, skip), up(x), F.pad(up(x), (0, 0, 0, 0))), x, skip, up=up, runs=None)


def test_channels_last_runs_as_one_operator():
    x, skip = (t.detach().to(memory_format=torch.channels_last) for t in inputs())
    check(cat, x, skip, up=upconv().to(memory_format=torch.channels_last))


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"dtype": torch.float64}], ids=str)
def test_kernels_and_dtypes(k, changes):
    check(cat, *(t.to(changes.get("dtype")) for t in inputs(k)), up=upconv(k, **changes))


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
@pytest.mark.parametrize("input_frozen", [False, True])
def test_frozen(frozen, input_frozen):
    up, (x, skip) = upconv(), inputs()
    for name in frozen:
        getattr(up, name).requires_grad_(False)
    check(cat, x.detach() if input_frozen else x, skip, up=up, runs=None)


@pytest.mark.parametrize(
    "skip, error",
    [
        (torch.randn(2, 3, 6, 9), "Sizes of tensors must match"),
        (torch.randn(1, 3, 6, 10), "Sizes of tensors must match"),
        (torch.randn(3, 6, 10), "same number of dimensions"),
        (torch.randn(2, 3, 6, 10, device="meta"), None),
        (None, "expected Tensor"),
    ],
    ids=["width", "batch", "rank", "meta", "none"],
)
def test_errors_are_those_of_torch(skip, error):
    errors = []
    for up in (upconv(), fused_copy(upconv())):
        try:
            assert torch.cat((up(inputs()[0]), skip), 1).is_meta
            errors.append("")
        except (RuntimeError, TypeError) as problem:
            errors.append(str(problem))
    assert errors[0] == errors[1] and (error is None or error in errors[0])


def test_the_reference_backend_runs_plain():
    fused, (x, _) = fused_copy(upconv()), inputs()
    with tokenfusion.backend("reference"):
        assert type(fused(x)) is torch.Tensor
    with tokenfusion.backend("reference"):
        check(cat, runs=False)


def test_a_default_device_changes_nothing():
    with torch.device("cpu"):
        check(cat)
    fused, (x, skip) = fused_copy(upconv()), inputs()
    torch.set_default_device("cpu")
    try:
        with assert_runs("upconv_concat_cpu"), torch.no_grad():
            cat(fused, x, skip)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "x",
    [torch.randn(6, 3, 5), torch.randn(0, 6, 3, 5), torch.randn(2, 6, 3, 5, dtype=torch.float64).requires_grad_()[:1]],
    ids=["no batch", "empty batch", "other dtype"],
)
def test_inputs_that_are_not_served(x):
    for up in (upconv(), fused_copy(upconv())):
        try:
            results = up(x)
        except RuntimeError as problem:
            results = str(problem)
        if type(up) is nn.ConvTranspose2d:
            expected = results
    assert type(results) in (str, torch.Tensor)
    assert results == expected if isinstance(results, str) else torch.equal(results, expected)


def test_a_small_result_is_computed_at_once(monkeypatch):
    x, skip = inputs()
    elements = fused_copy(upconv())(x).numel()
    for least, operators in ((elements, ["upconv_concat_cpu"]), (elements + 1, [])):
        monkeypatch.setattr("tokenfusion.layers.conv_transpose._LEAST_WORTHWHILE", least)
        with torch.no_grad(), assert_runs(*operators):
            torch.cat((fused_copy(upconv())(x), skip), 1)


def test_an_output_size():
    check(lambda up, x, skip: torch.cat((up(x, output_size=[6, 10]), skip), 1), runs=False)
