"""What a fused model returns or keeps is computed when its forward returns, as the plain one's is."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import tokenfusion
from tests.deferred import fused_copy, inputs, upconv
from tests.parity import assert_runs
from tokenfusion.layers import settled
from tokenfusion.layers.settled import settles


class Keeping(nn.Module):
    """Returns a concatenation and the result in it, and keeps another result."""

    def __init__(self):
        super().__init__()
        self.ups, self.kept = nn.ModuleList([upconv(), upconv(), upconv()]), None

    def forward(self, x, skip, fail=False):
        joined = torch.cat((self.ups[0](x), skip), 1)
        self.kept = self.ups[1](x)
        if fail:
            raise ValueError("asked to fail")
        return joined, self.ups[2](x)


def noticed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def data(model):
    for parameter in model.parameters():
        parameter.data.add_(1)


def averaged(model):
    for parameter in model.parameters():
        parameter.data.copy_(torch.full_like(parameter, 0.5))


def step(model):
    torch.optim.SGD(model.parameters(), 1.0).step()


def vector(model):
    parameters = list(model.parameters())
    nn.utils.vector_to_parameters(torch.ones(sum(p.numel() for p in parameters)), parameters)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("change", [noticed, data, averaged, step, vector])
def test_the_weights_change_after_the_model_returned(change, mode):
    found = []
    for model in (Keeping(), fused_copy(Keeping())):
        with mode():
            joined, returned = model(*inputs())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        change(model)
        found.append([joined, returned * 2, model.kept + 1])
    torch.testing.assert_close(*found)


class NotCompiled(nn.Module):
    """What it returns was computed by what a compiler leaves alone."""

    def __init__(self):
        super().__init__()
        self.up = upconv()

    @torch.compiler.disable
    def _up(self, x):
        return self.up(x)

    def forward(self, x):
        return {"up": [self._up(x)], "x": (x, None)}


@pytest.mark.parametrize("how", ["of the model", "in place"])
def test_the_weights_change_after_a_compiled_model_returned(how):
    found, (x, _) = [], inputs()
    for model in (NotCompiled(), fused_copy(NotCompiled())):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        if how == "in place":
            (compiled := model).compile(backend="eager")
        with torch.no_grad():
            result = compiled(x)["up"][0]
        data(model)
        found.append(result + 0)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_memory_of_the_input_changes_after_the_model_returned(mode):
    x, skip = (t.detach() for t in inputs())
    buffer, results = x.numpy(), []
    with mode():
        expected = Keeping()(x, skip)
        results = fused_copy(Keeping())(x, skip)
    buffer[:] = 7
    torch.testing.assert_close(results, expected)


def test_gradients_of_what_is_returned_and_kept():
    found = []
    for model in (Keeping(), fused_copy(Keeping())):
        joined, returned = model(*inputs())
        returned.retain_grad()
        (joined.square().sum() + returned.pow(3).sum() + model.kept.pow(3).sum()).backward()
        found.append([returned.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_nobody_holds_is_not_computed():
    model, tensors = fused_copy(Keeping()), inputs()
    with torch.autograd.profiler.profile() as profile:
        model(*tensors)
    assert [event.name for event in profile.function_events].count("aten::conv_transpose2d") == 2  # of three


def test_a_forward_that_fails():
    found = []
    for model in (Keeping(), fused_copy(Keeping())):
        with pytest.raises(ValueError, match="asked to fail"):
            model(*inputs(), fail=True)
        data(model)
        found.append(model.kept * 1)
    torch.testing.assert_close(*found)


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.kept = upconv(), None

    def forward(self, x):
        x = x * 1
        self.kept = self.up(x)
        return x.mul_(2)


@torch.no_grad()
def test_what_changes_within_the_model_is_an_error_only_where_it_is_used():
    model, (x, _) = fused_copy(Changing()), inputs()
    torch.testing.assert_close(model(x), x * 2)
    with pytest.raises(RuntimeError, match="changed in place after its call"):
        model.kept.sum()


def test_a_model_that_is_an_up_convolution_computes_at_once():
    up = upconv()
    report = tokenfusion.fuse(up, strict=True)
    assert report.replaced and tokenfusion.fuse(up) == report
    assert type(up(inputs()[0])) is torch.Tensor
    model = nn.Sequential(up)
    tokenfusion.fuse(model, strict=True)
    assert settles(model) and not settles(up)


def computed(model, *tensors) -> bool:
    return type(model(*tensors)) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_part_that_is_called_by_itself_computes_at_once(mode):
    plain, (x, _) = nn.Sequential(nn.ReLU(), upconv()), inputs()
    fused = fused_copy(plain)
    with mode():
        expected = plain(x)
        for call in (nn.Sequential(*fused.children()), lambda x: fused[1](fused[0](x)), fused.forward):
            result = call(x)
            data(fused)
            torch.testing.assert_close(result + 0, expected)
            fused.load_state_dict(plain.state_dict())


def test_what_fails_before_and_within_a_model_leaves_nothing_deferred_elsewhere():
    model, (x, skip) = fused_copy(Keeping()), inputs()
    for _ in range(2):
        with pytest.raises(ValueError, match="asked to fail"):
            model(x, skip, fail=True)
        assert computed(model.ups[0], x)

    def refuse(*_):
        raise ValueError("refused")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="refused"):
        model(x, skip)
    handle.remove()
    assert computed(model.ups[0], x)
    with torch.no_grad(), assert_runs("upconv_concat_cpu"):
        model(x, skip)


def test_what_interrupts_a_model_leaves_nothing_deferred_elsewhere():
    """Ctrl-C, for which no hook is called."""
    model, (x, skip) = fused_copy(Keeping()), inputs()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.ups[2].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x, skip)
        assert computed(model.ups[0], x)
    handle.remove()
    with torch.no_grad(), assert_runs("upconv_concat_cpu"):
        model(x, skip)
    assert computed(model.ups[0], x)


def test_a_model_within_another_and_another_thread():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.up = fused_copy(nn.Sequential(upconv())), upconv()

        def forward(self, x):
            self.inner(x)
            with ThreadPoolExecutor() as threads:
                elsewhere = threads.submit(computed, self.up, x).result()
            return elsewhere, computed(self.up, x)

    model, (x, _) = Outer(), inputs()
    model.up = fused_copy(nn.Sequential(model.up))[0]
    settled.add(model)
    with torch.no_grad():
        assert model(x) == (True, False)
        assert computed(model.up, x)


def test_the_hook_comes_and_goes():
    model = Keeping()
    handle = model.register_forward_hook(lambda *_: None)
    tokenfusion.fuse(model, ops=["dynamic_mixing"])
    assert not settles(model)
    for _ in range(2):
        tokenfusion.fuse(model)
        assert settles(model) and len(model._forward_hooks) == 2
    tokenfusion.unfuse(model)
    assert len(model._forward_hooks) == 1 and not model._forward_hooks_always_called and not model._forward_pre_hooks
    handle.remove()
    tokenfusion.fuse(model.ups)
    tokenfusion.fuse(model)
    assert settles(model) and not settles(model.ups)


COPIES = {
    "deep": copy.deepcopy,
    "shallow": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "scripted meanwhile": lambda model: (torch.jit.script(nn.Sequential(model[0])), torch.jit.script(model), model)[2],
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_settle(copied):
    model, (x, _) = copied(fused_copy(nn.Sequential(upconv()))), inputs()
    expected = upconv()(x)
    result = model(x)
    data(model)
    torch.testing.assert_close(result, expected)
    tokenfusion.unfuse(model)
    assert not model._forward_hooks


LOADED = """
import sys, torch
from torch import nn
model = torch.load(sys.argv[1], weights_only=False)
for _ in range(20):
    model.register_forward_hook(lambda *_: None)
result = model(torch.ones(1, 6, 128, 128))
assert type(result).__name__ == "DeferredUpConv", type(result)
for parameter in model.parameters():
    parameter.data.zero_()
assert result.abs().sum() > 0
"""


def test_a_copy_in_another_process_settles(tmp_path):
    torch.save(fused_copy(nn.Sequential(upconv())), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", LOADED, tmp_path / "model.pt"], check=True)


def test_torchscript_and_tracers_see_the_plain_model():
    plain, tensors = nn.Sequential(upconv()), inputs()[:1]
    fused = fused_copy(plain)
    for made in (
        torch.jit.script(fused),
        torch.jit.script(nn.Sequential(fused)),
        torch.jit.trace(fused, tensors),
        torch.export.export(fused, tensors).module(),
        torch.fx.symbolic_trace(fused),
    ):
        torch.testing.assert_close(made(*tensors), plain(*tensors))
    assert settles(fused)


def test_unfusing_a_model_that_contains_a_scripted_one():
    model = nn.Sequential(torch.jit.script(nn.ReLU()), upconv())
    tokenfusion.fuse(model)
    assert settles(model)
    tokenfusion.unfuse(model)
    assert not model._forward_hooks
