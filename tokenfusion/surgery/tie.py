"""Turning a network that somebody already has into its parameter-efficient form: a matrix and its transpose for two."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn.utils import parametrize

from tokenfusion.layers.drop_in import remember_forwards, why_not_part
from tokenfusion.layers.tied_resnet import TiedStage
from tokenfusion.layers.tied_transformer import TiedAttention, TiedFFN, activation_name
from tokenfusion.surgery.report import MatrixReport, TieReport, UntiedReport
from tokenfusion.surgery.rules.rule import Plan, first_plan, with_forward_on_instance

INITS = ("mean", "first", "fresh")
_SCALE_FREE = ("relu", "identity")  # act(s u) = s act(u) for s > 0


@torch.no_grad()
def tie_weights(model: nn.Module, *, init: str = "mean", pattern: str = "*") -> TieReport:
    """Give the layers of a model that have pairs of matrices one matrix and its transpose, in place.

    The parameter-efficient form of Koyun and Töreyin (2024). Known today: timm's `Mlp` (becomes a `TiedFFN`), timm's
    vision transformer `Attention` (a `TiedAttention`), and a stage, an nn.Sequential, of timm's ResNet `Bottleneck`
    blocks (a `TiedStage`: one matrix for all its 1x1 convolutions, its first block without a convolution on the
    shortcut). Biases, norms and 3x3 convolutions are kept, as the same parameters. What the model computes changes by
    as much as the report's errors say; it is to be trained on afterwards, with an optimizer made after this call.

    A module that stands in several places is tied once, and stands in all of them again. A matrix is frozen where those
    that it stands for were; device, dtype and training mode stay. Modules with hooks or parametrizations, or with one
    matrix of a pair frozen, are left alone.

    Args:
        model: an nn.Module that contains such modules; not one itself.
        init: the values of each matrix. "mean": the least-squares solution, that with the smallest sum of squared
            differences to all the matrices that it stands for, after their scales have been balanced where that does
            not change what the model computes (hidden units of an Mlp with relu or identity; query against key).
            "first": the first of them (W1, W_q and W_k; of a stage, conv1 of the second block). "fresh": random, as
            the layer initialises itself.
        pattern: names of modules to look at, for fnmatch, such as "blocks.*.mlp".

    Returns:
        TieReport: every module tied, with the relative error of each original matrix as it is rebuilt from the tied
        one; every module of a known kind that was left alone and why; the parameters before and after. Where nothing
        can be tied it says so, and the model is unchanged.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: an unknown init.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if init not in INITS:
        raise ValueError(f"init: got {init!r}, expected one of {', '.join(map(repr, INITS))}")
    before = _count(model)
    plans: dict[str, Plan] = {}
    left = []
    for name, module in model.named_modules():
        found = first_plan(_RULES, module) if name and fnmatch.fnmatchcase(name, pattern) else None
        if found is None:
            continue
        _, plan = found
        reason = plan.reason or _why_not_shared(model, module)
        if reason is None:
            plans[name] = plan
        else:
            left.append(UntiedReport(name, plan.kind, reason))
    matrices = []
    for name, plan in plans.items():
        module = model.get_submodule(name)
        places = [place for place, other in model.named_modules(remove_duplicate=False) if other is module]
        tied, originals = plan.apply(init)
        matrices += [MatrixReport(f"{name}.{key}", plan.kind, error) for key, error in originals]
        for place in places:
            model.set_submodule(place, tied.train(module.training))
    return TieReport(tuple(matrices), tuple(left), before, _count(model))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class _Rule:
    """Modules of one kind, named by op, with the reasons that are theirs alone. matrices are the parameters to be tied.

    tie makes the tied module, and gives each original matrix's name and relative error.
    """

    op: str
    matches: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    matrices: Callable[[nn.Module], list[nn.Parameter]]
    tie: Callable[[nn.Module, str], tuple[nn.Module, list[tuple[str, float]]]]

    def plan(self, module: nn.Module) -> Plan | None:
        if not self.matches(module):
            return None
        reason = (
            with_forward_on_instance(module)
            or _why_not_untouched(module)
            or self.why_not(module)
            or _why_not_frozen(self.matrices(module))
        )
        return Plan(self.op, reason, lambda init: self.tie(module, init))


def _why_not_untouched(module: nn.Module) -> str | None:
    """Hooks and parametrizations, of it or of a part, would be lost."""
    for name, part in module.named_modules():
        remember_forwards(type(part))
        reason = why_not_part(part, name or "it", type(part))
        if reason is None and parametrize.is_parametrized(part):
            reason = f"{name or 'it'} is parametrized"
        if reason is not None:
            return reason
    return None


def _why_not_shared(model: nn.Module, module: nn.Module) -> str | None:
    inside, own = set(module.modules()), set(module.parameters())
    for name, other in model.named_modules():
        for key, parameter in other._parameters.items():
            if other not in inside and parameter in own:
                return f"it shares a parameter with {f'{name}.{key}'.lstrip('.')}"
    return None


def _why_not_frozen(matrices: list[nn.Parameter]) -> str | None:
    if len({matrix.requires_grad for matrix in matrices}) > 1:
        return "some of its matrices are frozen and others are not"
    return None


def _error(rebuilt: torch.Tensor, original: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the original."""
    return float((rebuilt - original).double().norm() / original.double().norm().clamp_min(1e-30))


def _chosen(originals: list[torch.Tensor], init: str, fresh: torch.Tensor) -> torch.Tensor:
    """The single matrix for several of equal shape."""
    if init == "fresh":
        return fresh
    return originals[0] if init == "first" else torch.stack(originals).mean(0)


def _factory(parameter: torch.Tensor) -> dict:
    return {"device": parameter.device, "dtype": parameter.dtype}


def _why_not_linear(module: nn.Module, *names: str) -> str | None:
    for name in names:
        if type(getattr(module, name)) is not nn.Linear:
            return f"{name} is {type(getattr(module, name)).__name__}, expected nn.Linear"
    return None


def _why_not_mlp(mlp: Mlp) -> str | None:
    reason = _why_not_linear(mlp, "fc1", "fc2")
    if reason is not None:
        return reason
    if mlp.fc2.out_features != mlp.fc1.in_features:
        return f"fc2 leads to {mlp.fc2.out_features} channels, expected {mlp.fc1.in_features}, those that fc1 takes"
    if activation_name(mlp.act) is None:
        return f"act is {type(mlp.act).__name__}, which tied_ffn does not have"
    if not isinstance(mlp.norm, nn.Identity):
        return f"norm is {type(mlp.norm).__name__}, expected none inside the hidden layer"
    if (mlp.fc1.bias is None) != (mlp.fc2.bias is None):
        return "one of fc1 and fc2 has a bias and the other has none"
    if mlp.drop1.p != mlp.drop2.p:
        return f"dropout rates differ: {mlp.drop1.p:g} and {mlp.drop2.p:g}"
    return None


def _tie_mlp(mlp: Mlp, init: str):
    first, second = mlp.fc1.weight, mlp.fc2.weight.t()
    tied = TiedFFN(
        first.shape[1],
        first.shape[0],
        act_layer=lambda: mlp.act,
        bias=mlp.fc1.bias is not None,
        drop=mlp.drop1.p,
        **_factory(first),
    )
    tied.bias_in, tied.bias_out = mlp.fc1.bias, mlp.fc2.bias
    if init == "mean" and tied.activation in _SCALE_FREE:
        norms = first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True)
        scale = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0]).sqrt(), 1.0)
        first, second = first * scale, second / scale
        if tied.bias_in is not None:
            tied.bias_in.mul_(scale[:, 0])
    tied.weight.copy_(_chosen([first, second], init, tied.weight))
    tied.weight.requires_grad_(mlp.fc1.weight.requires_grad)
    return tied, [("fc1", _error(tied.weight, first)), ("fc2", _error(tied.weight, second))]


def _why_not_attention(attn: Attention) -> str | None:
    reason = _why_not_linear(attn, "qkv", "proj")
    if reason is not None:
        return reason
    dim = attn.qkv.in_features
    if attn.qkv.out_features != 3 * dim or attn.proj.weight.shape != (dim, dim):
        return f"qkv {list(attn.qkv.weight.shape)} and proj {list(attn.proj.weight.shape)} are not square"
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, name), nn.Identity):
            return f"{name} is {type(getattr(attn, name)).__name__}, which the tied form does not have"
    if attn.gate is not None:
        return "it has a gate, which the tied form does not have"
    return None


def _tie_attention(attn: Attention, init: str):
    q, k, v = attn.qkv.weight.chunk(3)
    out = attn.proj.weight
    tied = TiedAttention(
        len(q),
        attn.num_heads,
        qkv_bias=attn.qkv.bias is not None,
        proj_bias=attn.proj.bias is not None,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        **_factory(q),
    )
    scale = 1.0
    if init == "mean":  # only q . k counts, so that q may be larger and k smaller
        ratio = float(out.norm() * k.norm() / (q.norm() * v.norm()))
        scale = ratio**0.5 if 0 < ratio < float("inf") else 1.0
    q, k = q * scale, k / scale
    if attn.qkv.bias is not None:
        bias_q, bias_k, bias_v = attn.qkv.bias.chunk(3)
        for bias, value in ((tied.bias_q, bias_q * scale), (tied.bias_k, bias_k / scale), (tied.bias_v, bias_v)):
            bias.copy_(value)
            bias.requires_grad_(attn.qkv.bias.requires_grad)
    tied.bias_out = attn.proj.bias
    tied.weight_q.copy_(_chosen([q, out.t()], init, tied.weight_q))
    tied.weight_kv.copy_(_chosen([k, v.t()], init, tied.weight_kv))
    for weight in (tied.weight_q, tied.weight_kv):
        weight.requires_grad_(attn.qkv.weight.requires_grad)
    errors = [("q", _error(tied.weight_q, q)), ("k", _error(tied.weight_kv, k))]
    return tied, [*errors, ("v", _error(tied.weight_kv.t(), v)), ("proj", _error(tied.weight_q.t(), out))]


def _is_stage(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and len(module) > 0 and all(type(block) is Bottleneck for block in module)


def _tie_stage(stage: nn.Sequential, init: str):
    tied = TiedStage.of(stage)
    reduce = [block.conv1.weight[:, :, 0, 0] for block in stage]
    expand = [block.conv3.weight[:, :, 0, 0].t() for block in stage]
    repeats = tied.blocks[0].repeats
    whole = [*reduce[1:], *expand] if repeats > 1 else [*reduce, *expand]
    weight = _chosen(whole, init, tied.weight)
    if init == "mean" and repeats > 1:
        # the first conv1 is rebuilt as the sum of W's column blocks: its residual, spread evenly, is least squares
        residual = reduce[0] - weight.unflatten(1, (repeats, -1)).sum(1)
        weight = weight + (residual / (len(whole) + repeats)).repeat(1, repeats)
    tied.weight.copy_(weight)
    tied.weight.requires_grad_(stage[0].conv1.weight.requires_grad)
    errors = []
    for i, (conv1, conv3) in enumerate(zip(reduce, expand, strict=True)):
        rebuilt = tied.weight.unflatten(1, (tied.blocks[i].repeats, -1)).sum(1)
        errors += [(f"{i}.conv1", _error(rebuilt, conv1)), (f"{i}.conv3", _error(tied.weight, conv3))]
    return tied, errors


def _mlp_matrices(mlp: Mlp) -> list[nn.Parameter]:
    return [mlp.fc1.weight, mlp.fc2.weight]


def _attention_matrices(attn: Attention) -> list[nn.Parameter]:
    return [attn.qkv.weight, attn.proj.weight]


def _stage_matrices(stage: nn.Sequential) -> list[nn.Parameter]:
    return [conv.weight for block in stage for conv in (block.conv1, block.conv3)]


_RULES = (
    _Rule("Mlp", lambda module: type(module) is Mlp, _why_not_mlp, _mlp_matrices, _tie_mlp),
    _Rule(
        "Attention", lambda module: type(module) is Attention, _why_not_attention, _attention_matrices, _tie_attention
    ),
    _Rule("Bottleneck stage", _is_stage, TiedStage.why_not, _stage_matrices, _tie_stage),
)
