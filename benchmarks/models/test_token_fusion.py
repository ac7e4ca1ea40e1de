"""The Token Fusion models, and the same models in plain PyTorch operators."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.models.cases import Case

_MODELS = ("token_fusion_late", "token_fusion_early", "token_fusion_layerwise")
COST = 3
CASES = {
    "smoke": [],
    "quick": [Case(name, 1) for name in _MODELS],
    "gpu-full": [Case(name, b, "bfloat16") for b in (64, 256) for name in _MODELS],
    "full": [Case(name, b, dtype) for name in _MODELS for dtype in ("float32", "bfloat16") for b in (1, 8)],
}


def test_token_fusion(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    dtype = case.torch_dtype
    model = tokenfusion.create_model(case.model, pretrained_cnn=False).eval().to(problem.device(), dtype)
    exact = copy.deepcopy(model).double()
    forward, plain = problem.forward(model), problem.on_reference(problem.forward(model))

    def inputs():
        return (torch.randn(case.B, 3, 224, 224, device=problem.device(), dtype=dtype),)

    x, weight = inputs()[0], torch.empty(3, 1, 2, 2, device=problem.device(), dtype=dtype)
    variants = [Variant(problem.EAGER, plain)]
    if "eager" in compiles:
        compiled = problem.on_reference(problem.forward(problem.compiled(model)))
        variants.append(Variant(problem.COMPILED, compiled))
    variants += [
        Variant(problem.package(backend), forward, backend)
        for backend in problem.kernels_for("upconv_concat", x, weight)
    ]
    return Problem(
        "Token Fusion models, eager is the reference backend, 224 x 224",
        case.sizes(),
        variants,
        inputs,
        lambda images: problem.on_reference(problem.forward(exact))(images[:1]),
        moved=sum(t.nbytes for t in (*model.parameters(), x)),
        written=False,
        flops=case.B * _flops_an_image(plain, x),
    )


def _flops_an_image(plain, images: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        plain(images[:1])
    return counter.get_total_flops()
