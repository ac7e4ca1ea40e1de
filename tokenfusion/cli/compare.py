"""tokenfusion compare: a model and its fused form side by side on photographs, in results, time and memory.

For a model of timm, what `tokenfusion.fuse` makes of it. For a model of the package, its plain form, which is timm's
model or what the paper says in plain PyTorch, of the same weights; and the package's.
"""

import argparse
import copy
import json
import logging
import os
import platform
import statistics
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from rich.console import Console
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

import tokenfusion
from tokenfusion import measure
from tokenfusion.cli import compare_tables as tables
from tokenfusion.cli import images, timm_models, variants
from tokenfusion.cli.display import console, progress_bar
from tokenfusion.cli.errors import UsageError, first_line
from tokenfusion.kernels import dispatch
from tokenfusion.surgery import FuseReport

_TOP = 3
_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="a model and its fused form side by side: results, time, memory",
        description="Classifies photographs with a timm model, fuses a copy of it, and compares the two: results, then "
        "time and peak memory of the fused modules alone and of the whole model, each eager and under torch.compile. "
        "A model of this package is set beside its plain form of the same weights.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        default="crossvit_15_240",
        help="any model of timm or of tokenfusion (%(default)s)",
    )
    add("images", metavar="IMAGE", nargs="*", help="image files (scikit-learn's two sample photographs)")
    add("--batch-size", metavar="N", type=_positive, default=4, help="images in a timed batch (%(default)s)")
    add("--dtype", choices=_DTYPES, default="float32", help="(%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="(here: %(default)s)")
    add("--rounds", metavar="N", type=_positive, default=10, help="timed calls of each variant (%(default)s)")
    add("--backend", choices=("auto", *dispatch.BACKENDS), help=f"of the fused modules ({dispatch.get_backend()})")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out, which takes minutes")
    add("--json", metavar="FILE", type=Path, help="also write every number to FILE")


def run(args) -> int:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns where CUDA is without a GPU
    try:
        with tokenfusion.backend(args.backend or dispatch.get_backend()), torch.no_grad():
            facts = _compare(args, console())
        if args.json is not None:
            args.json.write_text(json.dumps(facts, indent=2) + "\n")
    except UsageError as error:
        print(f"tokenfusion compare: error: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return number


def _compare(args, out: Console) -> dict:
    """Prints each result as soon as it is there; returns all of them as plain data."""
    _check(args)
    photographs = images.load(args.images)
    with progress_bar(f"loading {args.model}"):
        loaded = timm_models.load(args.model)
        model, pixels = loaded.model, _preprocessed(loaded.model, photographs)
    facts = {"conditions": _conditions(args, loaded, pixels)}
    tables.print_conditions(out, facts["conditions"])

    with progress_bar("classifying"):
        exact = _logits(args, model, pixels.to(args.device), torch.float32)
        pixels = pixels.to(args.device, getattr(torch, args.dtype))
        logits = _logits(args, model, pixels, pixels.dtype)
    facts["images"] = _top(model, photographs, logits)
    tables.print_top(out, facts["images"], loaded.pretrained)

    fused = copy.deepcopy(model)
    report = tokenfusion.fuse(fused)
    if loaded.own is not None:
        fused = loaded.own.to(pixels.device, pixels.dtype)
    facts["modules"] = [asdict(module) for module in report.modules]
    tables.print_modules(out, report)
    if report.replaced:
        with progress_bar("running the fused model"):
            fused_logits, chosen = _fused_logits(args, fused, pixels)
        facts["difference"] = _differences(logits, fused_logits, exact)
        facts["operators"] = {operator: asdict(choice) for operator, choice in chosen.items()}
        tables.print_differences(out, facts["difference"], args.dtype, len(pixels))
        tables.print_backends(out, chosen)

    batch = _batch(pixels, args.batch_size)
    return facts | {"timings": _compare_time(args, out, model, fused, report, batch)}


def _compare_time(
    args, out: Console, model: nn.Module, fused: nn.Module, report: FuseReport, batch: torch.Tensor
) -> dict[str, dict]:
    timings = {}
    if report.replaced:
        names = variants.innermost(module.name for module in report.replaced)
        kinds = Counter(module.kind for module in report.replaced if module.name in names)
        calls = variants.recorded_calls(model, names, batch)
        alone = variants.Calls(model, calls), variants.Calls(fused, calls), [call[1:] for call in calls]
        timings["fused modules"] = _timings(args, "fused modules", *alone)
        title = f"The fused modules alone ({', '.join(f'{count} x {kind}' for kind, count in kinds.items())})"
        tables.print_timings(out, title, timings["fused modules"])
    timings["whole model"] = _timings(args, "whole model", model, fused if report.replaced else None, batch)
    tables.print_timings(out, "The whole model", timings["whole model"])
    tables.print_legend(out)
    return timings


def _timings(args, subject: str, eager: nn.Module, fused: nn.Module | None, inputs: object) -> dict[str, dict]:
    modules = variants.variants(eager, fused, compile=args.compile)
    with progress_bar(subject, len(modules) * (args.rounds + 3)) as step:
        return _timing_facts(variants.time_variants(modules, inputs, rounds=args.rounds, device=args.device, step=step))


def _check(args) -> None:
    """What can be known to fail before the long work starts."""
    timm_models.check_name(args.model)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: got 'cuda', but torch finds no GPU here")
    if args.json is not None:
        place = args.json if args.json.exists() else args.json.parent
        if args.json.is_dir() or not os.access(place, os.W_OK):
            raise UsageError(f"--json: {args.json}: cannot be written")


def _preprocessed(model: nn.Module, photographs: list) -> torch.Tensor:
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return torch.stack([transform(image) for _, image in photographs])


def _batch(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """`size` images: the given ones over and over."""
    return pixels[torch.arange(size, device=pixels.device) % len(pixels)]


def _logits(args, model: nn.Module, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Output of the model, which is moved to the device and dtype."""
    try:
        return torch.cat([model.to(args.device, dtype)(chunk) for chunk in pixels.split(args.batch_size)])
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = first_line(error)
        raise UsageError(f"MODEL: {args.model} does not run in {dtype} on {args.device}: {reason}") from None


def _fused_logits(args, fused: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Output of the fused model, and what the dispatcher chose for each operator."""
    outputs = []
    try:
        chosen = variants.dispatched(lambda: outputs.extend(fused(chunk) for chunk in pixels.split(args.batch_size)))
    except RuntimeError as error:
        if dispatch.get_backend() == "auto":
            raise
        raise UsageError(f"--backend: {first_line(error)}") from None
    return torch.cat(outputs), chosen


def _conditions(args, loaded: timm_models.Loaded, pixels: torch.Tensor) -> dict:
    return {
        "model": args.model,
        "pretrained": loaded.pretrained,
        "weights": loaded.weights,
        "eager": loaded.eager,
        "device": args.device,
        "device_name": torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "aten_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tokenfusion": tokenfusion.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "image_size": list(pixels.shape[1:]),
        "rounds": args.rounds,
        "backend": dispatch.get_backend(),
        "backends": tokenfusion.backends(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _top(model: nn.Module, photographs: list, logits: torch.Tensor) -> list[dict]:
    """The likeliest classes of each image; none where the model has no classifier."""
    top = _TOP if model.num_classes else 0
    subset = infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    probabilities, classes = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    return [
        {
            "image": name,
            "size": list(image.size),
            "top": [
                {
                    "class": index,
                    "label": info.index_to_description(index).split(",")[0] if info else f"class {index}",
                    "probability": probability,
                }
                for index, probability in zip(classes[i].tolist(), probabilities[i].tolist())
            ],
        }
        for i, (name, image) in enumerate(photographs)
    ]


def _differences(logits: torch.Tensor, fused: torch.Tensor, exact: torch.Tensor) -> dict:
    """How far the fused model is from the eager one, and both from that in float32."""
    return {
        "largest_logit": logits.abs().max().item(),
        "fused_from_eager": _difference(fused, logits),
        "eager_from_float32": _difference(logits, exact),
        "fused_from_float32": _difference(fused, exact),
        "same_top_1": int((logits.argmax(-1) == fused.argmax(-1)).sum()),
    }


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> dict:
    absolute = (actual.double() - expected.double()).abs().max().item()
    return {"absolute": absolute, "relative": absolute / max(expected.abs().max().item(), 1e-30)}


def _timing_facts(timings: dict[str, variants.Timing]) -> dict[str, dict]:
    """Each variant's figures; the ratios say how many times as fast it is, None where there is nothing to divide."""

    def times_as_fast(baseline: str, timing: variants.Timing) -> float | None:
        base = timings.get(baseline, variants.Timing()).seconds
        return None if base is None or timing.seconds is None else measure.median_ratio(base, timing.seconds)

    return {
        name: {
            **asdict(timing),
            "median_seconds": timing.seconds and statistics.median(timing.seconds),
            "fastest_seconds": timing.seconds and min(timing.seconds),
            "vs_eager": times_as_fast(variants.EAGER, timing),
            "vs_compile": times_as_fast(variants.COMPILED, timing),
        }
        for name, timing in timings.items()
    }
