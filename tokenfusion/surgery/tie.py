"""Turning a network that somebody already has into its parameter-efficient form: a matrix and its transpose for two."""

import fnmatch

import torch
from torch import nn

from tokenfusion.surgery.report import MatrixReport, TieReport, UntiedReport
from tokenfusion.surgery.rules.rule import Plan, first_plan
from tokenfusion.surgery.tying import RULES

INITS = ("mean", "first", "fresh")


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
        found = first_plan(RULES, module) if name and fnmatch.fnmatchcase(name, pattern) else None
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


def _why_not_shared(model: nn.Module, module: nn.Module) -> str | None:
    inside, own = set(module.modules()), set(module.parameters())
    for name, other in model.named_modules():
        for key, parameter in other._parameters.items():
            if other not in inside and parameter in own:
                return f"it shares a parameter with {f'{name}.{key}'.lstrip('.')}"
    return None
