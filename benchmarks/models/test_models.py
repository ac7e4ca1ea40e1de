"""Whole models as timm or their papers have them, fused by `fuse`, and this package's own of the same weights.

A training step is zero_grad, forward pass, cross-entropy, backward pass and AdamW. Its learning rate is 0, so that
every repetition starts from the same weights; the work is the same. Compared are the logits and the gradients of a few
weights, on two images repeated over the batch, which float64 then needs once.
"""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion.models
from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.models import cases

CASES = cases.CASES
COST = 3
_CHECKED = 2  # different images of the batch on which results are compared
_WEIGHTS_COMPARED = 3
_FLOPS_OF_TRAINING = 3  # forward, gradients of activations, gradients of weights
_TRANSFERS_OF_TRAINING = 10  # of each weight: two reads, its gradient's write, and what AdamW reads (4) and writes (3)
_OWN_PREFIX = "tokenfusion_"


def test_models(case: cases.Case, run, compiles):
    torch.manual_seed(0)
    model = timm.create_model(case.model).train(case.training).to(problem.device())
    if hasattr(model, "plain"):
        model = model.plain()  # of a model of this package, which comes as a variant
    fused = copy.deepcopy(model)
    if not tokenfusion.fuse(fused).replaced:
        pytest.skip(f"fuse replaces nothing in {case.model}")
    run(_problem(case, model, fused, compiles))


def _problem(case: cases.Case, model: nn.Module, fused: nn.Module, compiles: tuple[str, ...]) -> Problem:
    dtype, size = case.torch_dtype, model.default_cfg["input_size"]
    if not case.training:
        model, fused = model.to(dtype), fused.to(dtype)
    exact = copy.deepcopy(model).double()
    images_dtype = torch.float32 if case.training else dtype

    def inputs(count: int = case.B) -> tuple[torch.Tensor, ...]:
        images = torch.randn(count, *size, device=problem.device(), dtype=images_dtype)
        if not case.training:
            return (images,)
        return images, torch.arange(count, device=problem.device())  # classes

    checked = _CHECKED if case.B % _CHECKED == 0 else 1

    def repeated():
        return tuple(tensor.repeat(case.B // checked, *[1] * (tensor.ndim - 1)) for tensor in inputs(checked))

    def call(module: nn.Module, compile: bool = False) -> Callable:
        function = problem.compiled(module, "default") if compile else module
        return _training_step(function, module, case.dtype) if case.training else problem.forward(function)

    def reference(*tensors):
        return call(exact)(*(tensor[:checked] for tensor in tensors))

    variants = [Variant(problem.EAGER, call(model))]
    if "eager" in compiles:
        variants.append(Variant(problem.COMPILED, call(model, compile=True)))
    own = _own(case.model, model)
    backends = _backends(fused, inputs(1)[0])
    for backend in backends:
        replacements = {problem.package(backend): fused} | ({f"own model ({backend})": own} if own else {})
        for name, module in replacements.items():
            variants.append(Variant(name, call(module), backend))
            if "fused" in compiles and backend == backends[0]:  # a compilation lasts a minute
                variants.append(Variant(name + problem.AND_COMPILE, call(module, compile=True), backend))
    parameters = sum(p.nbytes for p in model.parameters())
    return Problem(
        case.group,
        case.sizes(),
        variants,
        inputs,
        reference,
        moved=parameters * (_TRANSFERS_OF_TRAINING if case.training else 1) + sum(t.nbytes for t in inputs()),
        written=case.training,
        flops=case.B * _flops_an_image(fused, inputs(1)[0]) * (_FLOPS_OF_TRAINING if case.training else 1),
        make_checked=repeated if case.training else None,
    )


def _training_step(function: Callable, model: nn.Module, dtype: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A step of `function`, which is the model or its compiled form; returns logits and gradients."""
    kind = problem.device()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True, capturable=kind == "cuda")
    weights = [p for p in model.parameters() if p.ndim > 1]
    compared = weights[:: max(len(weights) // _WEIGHTS_COMPARED, 1)]
    exact = weights[0].dtype == torch.float64

    def step(images: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        optimizer.zero_grad()
        with torch.autocast(kind, problem.dtype_of(dtype), enabled=dtype != "float32" and not exact):
            logits = function(images)
        F.cross_entropy(logits.to(images.dtype), classes).backward()
        optimizer.step()
        return logits.detach(), *(p.grad for p in compared)

    return step


def _own(name: str, model: nn.Module) -> nn.Module | None:
    """This package's own form of a model, with the same weights; None where there is none."""
    own_name = next((n for n in (_OWN_PREFIX + name, name) if n in tokenfusion.list_models()), None)
    if own_name is None:
        return None
    own = timm.create_model(own_name).train(model.training)
    own.load_state_dict(model.state_dict())
    return own.to(next(model.parameters()))


def _backends(fused: nn.Module, image: torch.Tensor) -> list[str]:
    """Backends with a kernel for every operator of the model, fastest first; the reference where there is none."""
    fused = copy.deepcopy(fused).eval()
    image = image.to(next(fused.parameters()))
    return [name for name in ("cuda", "triton", "cpu") if _runs(fused, image, name)] or ["reference"]


@torch.no_grad()
def _runs(fused: nn.Module, image: torch.Tensor, backend: str) -> bool:
    if tokenfusion.backends()[backend] is not None or any(backend == left_out for _, left_out in problem.without):
        return False
    try:
        with tokenfusion.backend(backend):
            fused(image)
    except RuntimeError:
        return False
    return True


def _flops_an_image(fused: nn.Module, image: torch.Tensor) -> int:
    fused = copy.deepcopy(fused).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, tokenfusion.backend("reference"), torch.no_grad():
        fused(image)
    return counter.get_total_flops()
