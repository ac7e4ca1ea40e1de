"""Stages of timm's ResNet of Bottleneck blocks in their tied form."""

from timm.models.resnet import Bottleneck
from torch import nn

from tokenfusion.layers.tied_resnet import TiedStage
from tokenfusion.surgery.tying.matrices import chosen, relative_error
from tokenfusion.surgery.tying.rule import TyingRule


def _is_stage(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and len(module) > 0 and all(type(block) is Bottleneck for block in module)


def _tie_stage(stage: nn.Sequential, init: str):
    tied = TiedStage.of(stage)
    reduce = [block.conv1.weight[:, :, 0, 0] for block in stage]
    expand = [block.conv3.weight[:, :, 0, 0].t() for block in stage]
    repeats = tied.blocks[0].repeats
    whole = [*reduce[1:], *expand] if repeats > 1 else [*reduce, *expand]
    weight = chosen(whole, init, tied.weight)
    if init == "mean" and repeats > 1:
        # the first conv1 is rebuilt as the sum of W's column blocks: its residual, spread evenly, is least squares
        residual = reduce[0] - weight.unflatten(1, (repeats, -1)).sum(1)
        weight = weight + (residual / (len(whole) + repeats)).repeat(1, repeats)
    tied.weight.copy_(weight)
    tied.weight.requires_grad_(stage[0].conv1.weight.requires_grad)
    errors = []
    for i, (conv1, conv3) in enumerate(zip(reduce, expand, strict=True)):
        rebuilt = tied.weight.unflatten(1, (tied.blocks[i].repeats, -1)).sum(1)
        errors += [(f"{i}.conv1", relative_error(rebuilt, conv1)), (f"{i}.conv3", relative_error(tied.weight, conv3))]
    return tied, errors


def _stage_matrices(stage: nn.Sequential) -> list[nn.Parameter]:
    return [conv.weight for block in stage for conv in (block.conv1, block.conv3)]


RULES = (TyingRule("Bottleneck stage", _is_stage, TiedStage.why_not, _stage_matrices, _tie_stage),)
