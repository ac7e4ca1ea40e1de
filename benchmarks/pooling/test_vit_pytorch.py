"""Cross-attention between two branches as in vit-pytorch's CrossViT, with its dropout in training."""

import copy
from dataclasses import replace

import pytest
import torch

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Problem
from benchmarks.ops.single_query_attention.cases import Case

CASES = {
    "smoke": [Case(2, 65, 64, 4, direction=TRAINING)],
    "quick": [],
    "full": [Case(batch, 401, 384, 8, direction=way) for batch in (64, 8) for way in (TRAINING, "forward")],
}
_DROPOUT = 0.1  # of the class of the whole model, by default


def test_cross_attention(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    """Half as many tokens in the other branch. Every variant draws its random numbers from the same seed."""
    cross_vit = pytest.importorskip("vit_pytorch.cross_vit")
    torch.manual_seed(0)
    sizes = dict(sm_dim=case.C, lg_dim=case.C, depth=1, heads=case.heads, dim_head=64)
    plain = cross_vit.CrossTransformer(**sizes, dropout=_DROPOUT).to(problem.device(), case.torch_dtype)
    plain.train(case.backward)
    exact, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    lengths = (case.N, (case.N + 1) // 2)

    def inputs() -> tuple[torch.Tensor, ...]:
        options = {"device": problem.device(), "dtype": case.torch_dtype}
        tokens = [torch.randn(case.B, n, case.C, **options) for n in lengths]
        if not case.backward:
            return tuple(tokens)
        return *(x.requires_grad_() for x in tokens), torch.randn(case.B, 2, case.C, **options)

    def timed(module):
        def class_tokens(*tokens: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(1)
            return torch.cat([branch[:, :1] for branch in module(*tokens)], dim=1)

        return problem.passes(class_tokens, case.backward, module.parameters() if case.backward else ())

    tokens = inputs()[0]
    kernels = problem.kernels_for("single_query_attention", tokens[:, :1], tokens, None)
    if case.backward:
        kernels = ["reference"]  # with dropout it computes with the weights, in plain PyTorch
    variants = problem.variants(timed, plain, fused, kernels, compiles=compiles)
    if case.backward:  # compiled code draws random numbers of its own
        variants = [replace(v, another_network="compile" in v.name) for v in variants]
    moved = 3 if case.backward else 1
    return Problem(
        "Cross-attention of vit-pytorch's CrossViT" + (", dropout 0.1" if case.backward else ""),
        case.sizes(),
        variants,
        inputs,
        timed(exact),
        moved=moved * case.B * sum(lengths) * case.C * case.torch_dtype.itemsize,
        written=case.backward,
        flops=moved * 4 * case.B * sum(lengths) * case.C * case.heads,
    )
