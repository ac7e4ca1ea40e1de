"""Whole CrossViT models of timm, as they are and after tokenfusion.fuse."""

import copy
from dataclasses import asdict, dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from benchmarks import problem
from benchmarks.problem import Problem, Variant

_CHECKED = 2  # images of the batch that are computed in float64 too


@dataclass(frozen=True)
class Case:
    model: str
    B: int
    dtype: str = "float32"
    direction: str = "forward"

    def __str__(self) -> str:
        return f"{self.model}-B{self.B}-{self.dtype}-{self.direction}"


_MODELS = ("crossvit_9_240", "crossvit_15_240", "crossvit_18_240")
CASES = {
    "smoke": [],
    "quick": [Case("crossvit_15_240", 4)],
    "full": [Case(name, b, dtype) for name in _MODELS for dtype in ("float32", "bfloat16") for b in (1, 8, 64)],
}


def test_crossvit(case: Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile == "full"))


def _problem(case: Case, with_compile: bool) -> Problem:
    torch.manual_seed(0)
    dtype = problem.dtype_of(case.dtype)
    model = timm.create_model(case.model).eval().to(problem.device(), dtype)
    exact, fused = copy.deepcopy(model).double(), copy.deepcopy(model)
    tokenfusion.fuse(fused, strict=True)
    size = model.default_cfg["input_size"]

    def inputs():
        return (torch.randn(case.B, *size, device=problem.device(), dtype=dtype),)

    tokens = torch.empty(1, 1, model.num_features // 2, device=problem.device(), dtype=dtype)
    variants = [Variant(problem.EAGER, problem.forward(model))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, problem.forward(problem.compiled(model))))
    for backend in problem.kernels_for("single_query_attention", tokens, tokens, None):
        variants.append(Variant(problem.package(backend), problem.forward(fused), backend))
        if with_compile:
            function = problem.forward(problem.compiled(fused))
            variants.append(Variant(f"{problem.package(backend)} + compile", function, backend))
    return Problem(
        "CrossViT models of timm, 240 x 240",
        asdict(case),
        variants,
        inputs,
        lambda images: problem.forward(exact)(images[:_CHECKED]),
        moved=sum(t.nbytes for t in (*model.parameters(), *inputs())),
        written=False,
        flops=case.B * _flops_an_image(fused, inputs()[0]),
    )


def _flops_an_image(fused, images: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, tokenfusion.backend("reference"):
        problem.forward(fused)(images[:1])
    return counter.get_total_flops()
