"""Replacing the modules of a model by fused ones, in place, and back."""

from collections.abc import Collection

from torch import nn

from tokenfusion.surgery.report import FuseReport, ModuleReport
from tokenfusion.surgery.rules import rule_for, rules


def fuse(model: nn.Module, *, ops: Collection[str] | None = None, strict: bool = False) -> FuseReport:
    """Give the modules of a model that tokenfusion knows a fused forward pass, in place.

    Parameters, buffers, hooks and the state_dict stay the same objects and names, so it may come before or after the
    optimizer, and the model can still be copied, pickled, trained, evaluated and compiled. Known today: timm's CrossViT
    (`MultiScaleBlock`, `CrossAttentionBlock`), in any model that contains them. A module that cannot be replaced is
    left as it was, and the report says why. `unfuse` takes everything back.

    Args:
        model: any nn.Module.
        ops: names of the operators to use, such as ["single_query_attention"]; None for all.
        strict: raise where a known module cannot be replaced.

    Returns:
        FuseReport: every known module, replaced or left alone and why. Modules that are fused already are listed as
        replaced.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: an unknown name in ops; or, with strict, a module that cannot be replaced. The model is unchanged.
    """
    _check_module(model)
    known = {rule.op for rule in rules()}
    if isinstance(ops, str):
        raise TypeError(f"ops: got the string {ops!r}, expected a collection of names such as [{ops!r}]")
    if ops is not None and not known.issuperset(ops):
        raise ValueError(f"ops: got {sorted(set(ops) - known)}, expected names among {sorted(known)}")
    replacements, reports = [], []
    for name, module in model.named_modules():
        rule = rule_for(module)
        if rule is None or (ops is not None and rule.op not in ops):
            continue
        reason = "its forward was set on the instance" if "forward" in vars(module) else rule.why_not(module)
        reports.append(ModuleReport(name, rule.original.__name__, rule.op, reason))
        if reason is None:
            replacements.append((module, rule.fused))
    report = FuseReport(tuple(reports))
    if strict and report.left:
        raise ValueError(f"model: not every module can be replaced, and strict was asked for\n{report}")
    for module, fused in replacements:
        module.__class__ = fused
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` replaced its original forward pass back, in place.

    Raises:
        TypeError: model is not an nn.Module.
    """
    _check_module(model)
    for module in model.modules():
        rule = rule_for(module)
        if rule is not None:
            module.__class__ = rule.original


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
