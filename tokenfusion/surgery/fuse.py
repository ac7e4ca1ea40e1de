"""Replacing the modules of a model by fused ones, in place, and back."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tokenfusion.layers import drop_in, settled
from tokenfusion.layers.conv_transpose import ConvTranspose2d
from tokenfusion.layers.own_layer import OwnLayer
from tokenfusion.surgery.report import FuseReport, ModuleReport
from tokenfusion.surgery.rules import rules
from tokenfusion.surgery.rules.rule import first_plan, with_forward_on_instance


def fuse(model: nn.Module, *, ops: Iterable[str] | None = None, strict: bool = False) -> FuseReport:
    """Give the modules of a model that tokenfusion knows a fused forward pass, in place.

    Parameters, buffers, hooks and the state_dict stay the same objects and names, so it may come before or after the
    optimizer, and the model can still be copied, pickled, trained, evaluated and compiled. `unfuse` takes everything
    back.

    Known today, in any model that contains them, are these modules of timm, by single_query_attention:

        CrossViT                        MultiScaleBlock, CrossAttentionBlock
        CaiT                            LayerScaleBlockClassAttn, or ClassAttn by itself
        XCiT                            ClassAttn
        VOLO                            ClassBlock, or ClassAttention by itself
        SigLIP and other ViTs ("map")   AttentionPoolLatent, unless it normalises its keys
        CLIP's ResNets                  AttentionPool2d, where it pools; RotAttentionPool2d is left alone

    and torch's own nn.MultiheadAttention, where a call has few queries over one tensor of keys and values, with masks,
    dropout and weights. Self-attention, and whatever else it is called for, runs torch's forward, so that the report
    has it as replaced, "decided per call"; attention of few queries in vit-pytorch, x-transformers, transformers
    (AIMv2, V-JEPA 2), torchmil, stable-pretraining, the attentive probes of V-JEPA, AIM, CAPI and EfficientProbing, or
    in any class with the same names of parameters or a rule of `register_rule`: a trial on random numbers shows first
    that, and what, such a module computes;

    by dynamic_mixing, DynaMixer's block and operation in the official code or any other, found by the names and shapes
    of their parameters, and tried as well;

    and by upconv_concat, in U-Net decoders, nn.ConvTranspose2d with kernel = stride. The model's own forward runs:
    where torch.cat joins the result with one other tensor along the channels, both are one operator; whatever else is
    done with it computes the convolution as before. What a forward leaves is computed when it returns, by a hook on the
    model.

    A module that cannot be replaced is left as it was, and the report says why: dropout of attention weights in
    training in timm's modules, rotary or normalised keys, parts of another class, hooks that would no longer run. At
    every call a fused module looks at its parts again. Where one was changed, by a hook, an adapter, pruning,
    quantisation, another class, and for what only a call can tell, such as a mask, the original forward pass runs; a
    change is logged once for each module, as a warning of the logger "tokenfusion". So it does under torch.func,
    forward-mode differentiation, tracing, scripting and exporting. Patch the forward of a class, if at all, after a
    first `fuse` of its modules: one that is patched when it is first seen keeps to its original forward when the patch
    is taken off.

    Args:
        model: any nn.Module.
        ops: names of the operators to use, such as ["single_query_attention"]; None for all.
        strict: raise where a known module cannot be replaced.

    Returns:
        FuseReport: every known module, replaced or left alone and why. Modules that are fused already are listed as
        replaced, or with the reason why their original forward runs at present.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: an unknown name in ops; or, with strict, a module that cannot be replaced. The model is unchanged.
    """
    _check_module(model)
    known = {rule.op for rule in rules()}
    if isinstance(ops, str) or not isinstance(ops, Iterable | None):
        raise TypeError(f"ops: got {ops!r}, expected a collection of names such as ['upconv_concat']")
    ops = known if ops is None else set(ops)
    if not ops <= known:
        raise ValueError(f"ops: got {sorted(ops - known, key=str)}, expected names among {sorted(known)}")
    used = tuple(rule for rule in rules() if rule.op in ops)
    plans, reports, absorbed = {}, [], set()
    for name, module in model.named_modules():  # parents come before their children
        found = None if module in absorbed else first_plan(used, module)
        if found is None:
            continue
        rule, plan = found
        reports.append(ModuleReport(name, plan.kind, rule.op, plan.reason, plan.note))
        if plan.reason is None:
            plans[name] = module, plan
            absorbed.update(plan.absorbs)
    report = FuseReport(tuple(reports), sum(isinstance(module, OwnLayer) for module in model.modules()))
    if strict and report.left:
        raise ValueError(f"model: not every module can be replaced, and strict was asked for\n{report}")
    for name, (module, plan) in plans.items():
        plan.apply()
        drop_in.name(module, name)
    if any(isinstance(module, ConvTranspose2d) for module, _ in plans.values()):
        settled.add(model)
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` replaced its original forward pass back, in place.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: something that was done to a fused module holds on to its fused forward or class: a forward set on
            the instance, as offloading does, or a parametrization. The model is unchanged.
    """
    _check_module(model)
    fused = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, drop_in.DropIn)
        and type(module) is not module.original
        and ("original" in vars(type(module)) or is_parametrized(module))  # and no subclass of somebody's own
    }
    for name, module in fused.items():
        reason = with_forward_on_instance(module)
        if reason is None and is_parametrized(module):
            reason = "it is parametrized"
        if reason is not None:
            raise ValueError(f"model: {name or 'the model itself'} cannot be unfused: {reason}; take that off first")
    for module in fused.values():
        drop_in.restore(module)
    settled.remove(model)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
