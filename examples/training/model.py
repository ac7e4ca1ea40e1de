"""The model that finetune.py trains, and what is done to images for it."""

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
    if Path(args.model).is_dir():
        model, config = checkpoints.load(Path(args.model))
        args.tie = args.tie or config["tied"]
        if config["label_names"] != classes:
            model.reset_classifier(len(classes))
        return model, config["model_args"] | {"num_classes": len(classes)}
    models.check_name(args.model)
    options = (digits.tiny(args.model) if args.data is None else {}) | args.model_kwargs | {"num_classes": len(classes)}
    model, why_not = None, "--no-pretrained"
    if args.pretrained is not False:
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
    if args.tie:
        args.say(first_line(tokenfusion.tie_weights(model)))
    return model, options
