"""TorchScript, torch.fx and exports of every model in a small setting, as of timm's models."""

import pickle
import subprocess
import sys

import numpy
import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.crossvit import randomize
from tests.models.small import SMALL, small_images, small_model

_PE = {
    "vit_pe_small_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10},
    "resnet50_pe1": {"layers": (2, 1, 1, 1), "num_classes": 10},
}
_ONE_OF_EACH_FAMILY = ("crossvit", "dynamixer", "token_fusion_layerwise", *_PE)
_OTHERS = ("crossvit_t2t", "crossvit_all_attention", "crossvit_pairwise", "crossvit_without_class_tokens")
_OTHERS += ("dynamixer_random", "dynamixer_plain_sum", "token_fusion_late", "token_fusion_early")
every_form = pytest.mark.parametrize("key", [*_ONE_OF_EACH_FAMILY, *_OTHERS])
_LOAD_WITHOUT_THE_PACKAGE = """
import pickle, sys, torch
for path, images, expected in pickle.load(sys.stdin.buffer):
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(path)(images), expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("tokenfusion") for name in sys.modules)
"""


def _model_and_images(key: str) -> tuple[nn.Module, torch.Tensor]:
    if key in SMALL:
        return small_model(key), small_images(key)
    torch.manual_seed(0)
    options = {"zero_init_last": False} if key.startswith("resnet") else {}
    model = randomize(timm.create_model(key, **_PE[key], **options)).eval()
    return model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _assert_same(got: nn.Module, model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got(images), model(images), rtol=1e-4, atol=1e-5)


@every_form
def test_torchscript(key):
    model, images = _model_and_images(key)
    scripted = torch.jit.script(model)
    _assert_same(scripted, model, images)
    _assert_same(torch.jit.trace(model, images), model, images)
    scripted(images).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_torchscript_files_need_no_package(tmp_path):
    given = []
    for key in _ONE_OF_EACH_FAMILY:
        model, images = _model_and_images(key)
        for made in (torch.jit.script(model), torch.jit.trace(model, images)):
            path = str(tmp_path / f"{len(given)}.pt")
            made.save(path)
            given.append((path, images, model(images).detach()))
    command = [sys.executable, "-c", _LOAD_WITHOUT_THE_PACKAGE]
    ran = subprocess.run(command, input=pickle.dumps(given), capture_output=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr.decode()


@every_form
def test_fx(key):
    model, images = _model_and_images(key)
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    options["param_shapes_constant"] = True
    of_training, of_inference = get_graph_node_names(model, tracer_kwargs=options)
    nodes = {"train_return_nodes": of_training[-1:], "eval_return_nodes": of_inference[-1:]}
    traced = create_feature_extractor(model, **nodes, tracer_kwargs=options)
    with torch.inference_mode():
        assert torch.equal(traced(images)[of_inference[-1]], model(images))
    torch.jit.script(traced)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("key", _ONE_OF_EACH_FAMILY)
def test_export(key, strict):
    model, images = _model_and_images(key)
    with torch.no_grad():
        _assert_same(torch.export.export(model, (images,), strict=strict).module(), model, images)


@pytest.mark.parametrize("key", _ONE_OF_EACH_FAMILY)
def test_onnx(key, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = _model_and_images(key)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    numpy.testing.assert_allclose(got, model(images).detach(), rtol=1e-3, atol=1e-4)
