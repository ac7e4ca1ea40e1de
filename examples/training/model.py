"""The model that finetune.py trains."""

from pathlib import Path

import timm
import torch
from torch import nn

import tokenfusion
from tokenfusion.cli.compare import models
from tokenfusion.cli.errors import UsageError, first_line
from training import checkpoints, digits


def make(args, classes: list[str]) -> tuple[nn.Module, dict]:
    """The model with its first weights, not fused, and the keyword arguments that make it again.

    Raises:
        UsageError: there is no such model, or it takes no such arguments.
    """
    model, options, tied = _of_folder(args, classes) if Path(args.model).is_dir() else _by_name(args, classes)
    if args.tie and not tied:
        args.say(first_line(tokenfusion.tie_weights(model)))
    args.tie = args.tie or tied
    return model, options


def check_size(args, model: nn.Module) -> None:
    """
    Raises:
        UsageError: the model takes no images of the size that --img-size names.
    """
    size = "x".join(map(str, model.pretrained_cfg["input_size"]))
    if not args.img_size:
        return
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    except (RuntimeError, AssertionError, ValueError) as error:
        how = "if its family can be made for them: --model-kwargs img_size=N"
        raise UsageError(f"--img-size: {args.model} takes no images of {size}: {first_line(error)}; {how}") from None


def _of_folder(args, classes: list[str]) -> tuple[nn.Module, dict, bool]:
    """And whether its matrices are tied."""
    if args.model_kwargs or args.pretrained is not None:
        name = "--model-kwargs" if args.model_kwargs else "--pretrained"
        raise UsageError(f"{name}: the model is the folder {args.model}, which has its arguments and weights")
    model, config = checkpoints.load(Path(args.model))
    if config["label_names"] != classes:
        torch.manual_seed(args.seed)
        model.reset_classifier(len(classes))
    return model, config["model_args"] | {"num_classes": len(classes)}, config["tied"]


def _by_name(args, classes: list[str]) -> tuple[nn.Module, dict, bool]:
    models.check_name(args.model)
    options = (digits.tiny(args.model) if args.data is None else {}) | args.model_kwargs | {"num_classes": len(classes)}
    model, why_not = None, "--pretrained asks for others" if args.data is None else "--no-pretrained"
    if args.pretrained or (args.pretrained is None and args.data):
        torch.manual_seed(args.seed)  # of a new head
        model, why_not = models.pretrained(args.model, **options)
    if model is None and args.pretrained:
        raise UsageError(f"--pretrained: {why_not}")
    if model is None:
        torch.manual_seed(args.seed)
        try:
            model = timm.create_model(args.model, **options)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"--model-kwargs: timm cannot build {args.model}: {first_line(error)}") from None
    args.say(f"{args.model}, {f'random weights: {why_not}' if why_not else 'pretrained weights'}")
    return model, options, False
