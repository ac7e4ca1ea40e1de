"""A layer of timm beside its fused form, as a problem."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models import crossvit
from torch import nn

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.single_query_attention.cases import Case


def cross_attention_block(case: Case) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=1e-6)
    return crossvit.CrossAttentionBlock(case.C, case.heads, qkv_bias=True, norm_layer=norm)


def layer_problem(
    layer: nn.Module,
    case: Case,
    inputs: Callable[[], tuple[torch.Tensor, ...]],
    *,
    compiles: tuple[str, ...],
    dense: int,
    others: Sequence[tuple[str, type[nn.Module]]] = (),
) -> Problem:
    """
    Args:
        layer: of timm, in float32.
        inputs: makes what layer takes, the tokens first; in training every tensor gets a gradient.
        dense: multiplications and additions of a forward pass around the op.
        others: (name, class) of further variants, subclasses of the layer's.
    """
    layer = layer.to(case.torch_dtype).train(case.backward)
    exact = copy.deepcopy(layer).double().to(problem.device())
    layer = layer.to(problem.device())
    fused = copy.deepcopy(layer)
    tokenfusion.fuse(fused, strict=True)

    def with_gradient():
        tensors = [x.to(problem.device(), case.torch_dtype) for x in inputs()]
        if not case.backward:
            return tuple(tensors)
        with torch.no_grad():
            output = layer(*tensors)
        return *(x.requires_grad_() for x in tensors), torch.randn_like(output)

    tokens = torch.empty(case.B, case.N, case.C, device=problem.device(), dtype=case.torch_dtype)
    kernels = problem.kernels_for("single_query_attention", tokens[:, : case.heads], tokens, None)
    timed = partial(problem.passes, backward=case.backward)

    def other(kind: type[nn.Module]) -> nn.Module:
        copied = copy.deepcopy(layer)
        copied.__class__ = kind
        return copied

    named = [Variant(name, timed(other(kind))) for name, kind in others]
    products = 14 if case.backward else 4  # the op's
    return Problem(
        f"{type(layer).__name__}, eager is timm's",
        case.sizes(),
        problem.variants(timed, layer, fused, kernels, compiles=compiles, others=named),
        with_gradient,
        timed(exact),
        moved=case.moved(shared=sum(p.numel() for p in layer.parameters()), per_image=case.C),
        written=case.backward,
        flops=products * case.B * case.heads * case.N * case.C + (3 if case.backward else 1) * dense,
    )
