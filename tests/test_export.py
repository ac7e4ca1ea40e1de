"""Operators and layers can be traced and exported; what comes out is plain PyTorch, or ONNX."""

import io
import re

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import tokenfusion
from tests.public import LAYERS, OPERATORS, layer
from tokenfusion.kernels import upconv_concat

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
_OPERATOR = re.compile(r"tokenfusion::|ops\.tokenfusion|target=tokenfusion|tokenfusion_")  # in a graph's text or code


class _Root(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call


def root_of(call, inputs) -> nn.Module:
    """A model whose forward has as many arguments as there are inputs: tracers take them from its signature."""
    names = ", ".join(f"input{i}" for i in range(len(inputs)))
    scope = {"Base": _Root}
    exec(f"class Root(Base):\n    def forward(self, {names}):\n        return self.call({names})", scope)
    return scope["Root"](call).eval()


def model_of(name):
    call, inputs = OPERATORS[name] if name in OPERATORS else layer(name)
    return root_of(call, inputs).float(), tuple(tensor.float() for tensor in inputs)


def traced_by_torchscript(model, inputs):
    traced = torch.jit.trace(model, inputs, check_trace=False)
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    return traced, "".join(str(node) for node in traced.inlined_graph.nodes())


def exported(model, inputs, strict=False):
    program = torch.export.export(model, inputs, strict=strict)
    return program.module(), str(program.graph)


def traced_by_fx(model, inputs):
    traced = torch.fx.symbolic_trace(model)
    return traced, traced.code


def traced_by_make_fx(model, inputs):
    traced = make_fx(model)(*inputs)
    return traced, traced.code


def exported_to_onnx(model, inputs, path, dynamo):
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, inputs, path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]

    def run(*inputs):
        (out,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        return torch.from_numpy(out)

    return run, " ".join(f"{node.domain}::{node.op_type}" for node in onnx.load(path).graph.node)


def assert_plain(artefact, text, model, inputs):
    assert not _OPERATOR.search(text)
    with tokenfusion.backend("reference"):
        expected = model(*inputs)
    torch.testing.assert_close(artefact(*inputs).detach(), expected.detach(), rtol=1e-4, atol=1e-5)


TRACERS = {
    "torch.jit.trace": traced_by_torchscript,
    "torch.export": exported,
    "torch.fx": traced_by_fx,
    "make_fx": traced_by_make_fx,
}
# whose control flow asks for sizes or dtypes, which torch.fx has not
BY_SIZES = {"CrossAttentionBlock", "MultiScaleBlock", "SingleQueryAttention, masked"}

every_case = pytest.mark.parametrize("name", [*OPERATORS, *LAYERS])


@pytest.mark.parametrize("recording", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("tracer", TRACERS)
@every_case
def test_traced(name, tracer, recording):
    if tracer == "torch.fx" and name in BY_SIZES:
        pytest.skip("its control flow asks for what torch.fx has not")
    model, inputs = model_of(name)
    with torch.set_grad_enabled(recording):
        artefact, text = TRACERS[tracer](model, inputs)
    assert_plain(artefact, text, model, inputs)


@pytest.mark.parametrize("name", ["CrossAttentionBlock", "DynaMixerBlock", "TiedFFN", "UpConvConcat"])
def test_exported_strictly(name):
    model, inputs = model_of(name)
    assert_plain(*exported(model, inputs, strict=True), model, inputs)


@every_case
def test_exported_to_onnx_by_torchscript(name, tmp_path):
    model, inputs = model_of(name)
    assert_plain(*exported_to_onnx(model, inputs, tmp_path / "model.onnx", dynamo=False), model, inputs)


@pytest.mark.parametrize("name", ["SingleQueryAttention", "DynaMixerBlock", "UpConvConcat"])
def test_exported_to_onnx(name, tmp_path):
    model, inputs = model_of(name)
    assert_plain(*exported_to_onnx(model, inputs, tmp_path / "model.onnx", dynamo=True), model, inputs)


@pytest.mark.parametrize("tracer", ["torch.jit.trace", "torch.fx"])
@pytest.mark.parametrize("name", ["SingleQueryAttention", "DynaMixerBlock", "TiedFFN", "UpConvConcatProject"])
def test_a_trace_takes_other_batches(name, tracer):
    model, inputs = model_of(name)
    artefact, text = TRACERS[tracer](model, inputs)
    assert_plain(artefact, text, model, [torch.cat((tensor, tensor)) for tensor in inputs])


def test_an_artefact_loads_without_the_package(run_python, tmp_path):
    model, inputs = model_of("DynaMixerBlock")
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, inputs), tmp_path / "exported.pt2")
    torch.save((inputs, model(*inputs)), tmp_path / "expected.pt")
    run_python(
        f"""
        import sys
        sys.modules["tokenfusion"] = None
        import torch
        inputs, expected = torch.load("{tmp_path}/expected.pt")
        torch.testing.assert_close(torch.jit.load("{tmp_path}/traced.pt")(*inputs), expected)
        torch.testing.assert_close(torch.export.load("{tmp_path}/exported.pt2").module()(*inputs), expected)
        """
    )


def test_an_argument_that_is_no_tensor_is_named_under_a_tracer_too():
    x, weight, bias, skip = OPERATORS["upconv_concat"].tensors
    with pytest.raises(TypeError, match="skip: got list, expected a torch.Tensor"):
        make_fx(lambda x: upconv_concat(x, weight, bias, [skip]))(x)
