"""What `tokenfusion compare` finds, as plain data."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import tokenfusion
from tokenfusion import measure
from tokenfusion.cli.compare import timing
from tokenfusion.cli.compare.images import Photograph
from tokenfusion.cli.compare.models import Loaded
from tokenfusion.kernels import dispatch

_TOP = 3


def conditions(args, loaded: Loaded, pixels: torch.Tensor) -> dict:
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


def top(model: nn.Module, photographs: Sequence[Photograph], logits: torch.Tensor, most: int = _TOP) -> list[dict]:
    """The likeliest classes of each image; none where the model has no classifier."""
    count = min(most, logits.shape[-1]) if model.num_classes else 0
    names = _names(model)
    probabilities, classes = logits.float().softmax(-1).topk(count)
    return [
        {
            "image": photograph.name,
            "size": list(photograph.image.size),
            "remark": photograph.remark,
            "top": [
                {"class": index, "label": names(index), "probability": probability}
                for index, probability in zip(classes[i].tolist(), probabilities[i].tolist(), strict=True)
            ],
        }
        for i, photograph in enumerate(photographs)
    ]


def _names(model: nn.Module) -> Callable[[int], str]:
    """What the classes are called: as its configuration says, or in ImageNet."""
    own = model.pretrained_cfg.get("label_names")
    if isinstance(own, (list, tuple)) and len(own) == model.num_classes:
        return lambda index: own[index]
    subset = infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    return lambda index: info.index_to_description(index).split(",")[0] if info else f"class {index}"


def differences(model: nn.Module, logits: torch.Tensor, fused: torch.Tensor, exact: torch.Tensor) -> dict:
    """How far the fused model is from the eager one, and both from that in float32; same_top_1: images of whose
    likeliest class both say the same, None where the model has no classifier."""
    return {
        "largest_logit": logits.abs().max().item(),
        "fused_from_eager": _difference(fused, logits),
        "eager_from_float32": _difference(logits, exact),
        "fused_from_float32": _difference(fused, exact),
        "same_top_1": int((logits.argmax(-1) == fused.argmax(-1)).sum()) if model.num_classes else None,
    }


@dataclass(frozen=True)
class Dispatched:
    """How many calls of an operator ran on each backend, and why each backend could not take the latest of them."""

    calls: dict[str, int]
    why_not: dict[str, str | None]


def dispatched(choices: Iterable[dispatch.Choice]) -> dict[str, Dispatched]:
    """Operator name -> what the dispatcher chose."""
    chosen: dict[str, Dispatched] = {}
    for choice in choices:
        note = chosen.setdefault(choice.operator, Dispatched(dict.fromkeys(choice.why_not, 0), {}))
        note.calls[choice.backend] += 1
        note.why_not.update(choice.why_not)
    return chosen


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> dict:
    absolute = (actual.double() - expected.double()).abs().max().item()
    return {"absolute": absolute, "relative": absolute / max(expected.abs().max().item(), 1e-30)}


def of_timings(timings: dict[str, timing.Timing]) -> dict[str, dict]:
    """Each variant's figures; the ratios say how many times as fast it is, None where there is nothing to divide."""

    def times_as_fast(baseline: str, timed: timing.Timing) -> float | None:
        base = timings.get(baseline, timing.Timing()).seconds
        return None if base is None or timed.seconds is None else measure.median_ratio(base, timed.seconds)

    return {
        name: {
            **asdict(timed),
            "median_seconds": timed.seconds and statistics.median(timed.seconds),
            "fastest_seconds": timed.seconds and min(timed.seconds),
            "vs_eager": times_as_fast(timing.EAGER, timed),
            "vs_compile": times_as_fast(timing.COMPILED, timed),
        }
        for name, timed in timings.items()
    }
