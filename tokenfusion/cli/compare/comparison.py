"""The comparison, printed result by result.

For a model of timm, what `tokenfusion.fuse` makes of it. For a model of the package, its plain form, which is timm's
model or what the paper says in plain PyTorch, of the same weights; and the package's.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import tokenfusion
from tokenfusion import precision
from tokenfusion.cli.compare import facts, images, models, record, tables, timing
from tokenfusion.cli.display import console, progress_bar
from tokenfusion.cli.errors import UsageError, first_line
from tokenfusion.kernels import dispatch
from tokenfusion.surgery import FuseReport


def run(args) -> None:
    """
    Raises:
        UsageError: an argument that cannot be used, before the long work where that can be known.
    """
    models.check_name(args.model)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: got 'cuda', but torch finds no GPU here")
    photographs = images.load(args.images)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(record.opened(args.json)) if args.json is not None else None
        stack.enter_context(_enough_memory(args))
        stack.enter_context(tokenfusion.backend(args.backend or dispatch.get_backend()))
        stack.enter_context(torch.no_grad())
        found = _compare(args, photographs, console())
        if write is not None:
            write(found)


@contextlib.contextmanager
def _enough_memory(args) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # on a CPU, PyTorch has no class of its own for it
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            reason = f"{args.model} and batches of {args.batch_size} do not fit into the memory of {args.device}"
            raise UsageError(f"--batch-size: {reason}") from None
        raise


def _compare(args, photographs: Sequence[images.Photograph], out: Console) -> dict:
    """Prints each result as soon as it is there; returns all of them as plain data."""
    with progress_bar(f"loading {args.model}"):
        loaded = models.load(args.model)
        model, pixels = loaded.model, _preprocessed(loaded.model, photographs)
    found = {"conditions": facts.conditions(args, loaded, pixels)}
    tables.print_conditions(out, found["conditions"])

    with progress_bar("classifying"):
        with precision.ieee():
            exact = _outputs(args, model, pixels.to(args.device), torch.float32)
        pixels = pixels.to(args.device, getattr(torch, args.dtype))
        outputs = _outputs(args, model, pixels, pixels.dtype)
    found["images"] = facts.top(model, photographs, outputs)
    tables.print_top(out, found["images"], loaded.pretrained)

    fused = copy.deepcopy(model)
    report = tokenfusion.fuse(fused)
    if loaded.own is not None:
        fused = loaded.own.to(pixels.device, pixels.dtype)
    found["modules"] = [asdict(module) for module in report.modules]
    tables.print_modules(out, report)
    if report.replaced:
        with progress_bar("running the fused model"):
            fused_outputs, chosen = _fused_outputs(args, fused, pixels)
        found["difference"] = facts.differences(model, outputs, fused_outputs, exact)
        found["operators"] = {operator: asdict(choice) for operator, choice in chosen.items()}
        tables.print_differences(out, found["difference"], args.dtype, len(pixels))
        tables.print_backends(out, chosen)

    batch = pixels[torch.arange(args.batch_size, device=pixels.device) % len(pixels)]
    return found | {"timings": _compare_time(args, out, model, fused, report, batch)}


def _compare_time(
    args, out: Console, model: nn.Module, fused: nn.Module, report: FuseReport, batch: torch.Tensor
) -> dict[str, dict]:
    timings = {}
    if report.replaced:
        names = timing.innermost(module.name for module in report.replaced)
        kinds = Counter(module.kind for module in report.replaced if module.name in names)
        calls = timing.recorded_calls(model, names, batch)
        alone = timing.Calls(model, calls), timing.Calls(fused, calls), [call[1:] for call in calls]
        timings["fused modules"] = _timings(args, "fused modules", *alone)
        title = f"The fused modules alone ({', '.join(f'{count} x {kind}' for kind, count in kinds.items())})"
        tables.print_timings(out, title, timings["fused modules"])
    timings["whole model"] = _timings(args, "whole model", model, fused if report.replaced else None, batch)
    tables.print_timings(out, "The whole model", timings["whole model"])
    tables.print_legend(out, args.compile)
    return timings


def _timings(args, subject: str, eager: nn.Module, fused: nn.Module | None, inputs: object) -> dict[str, dict]:
    modules = timing.variants(eager, fused, compile=args.compile)
    with progress_bar(subject, len(modules) * (args.rounds + 3)) as step:
        timed = timing.time_variants(modules, inputs, rounds=args.rounds, device=args.device, step=step)
    return facts.of_timings(timed)


def _preprocessed(model: nn.Module, photographs: Sequence[images.Photograph]) -> torch.Tensor:
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    crop = images.middle if config["crop_mode"] == "center" else lambda image: image
    return torch.stack([transform(crop(photograph.image)) for photograph in photographs])


def _outputs(args, model: nn.Module, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Output of the model, which is moved to the device and dtype."""
    try:
        return torch.cat([model.to(args.device, dtype)(chunk) for chunk in pixels.split(args.batch_size)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        reason = first_line(error)
        raise UsageError(f"MODEL: {args.model} does not run in {dtype} on {args.device}: {reason}") from None


def _fused_outputs(args, fused: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, facts.Dispatched]]:
    """Output of the fused model, and what the dispatcher chose for each operator."""
    try:
        with dispatch.observe() as seen:
            outputs = torch.cat([fused(chunk) for chunk in pixels.split(args.batch_size)])
    except RuntimeError as error:
        if dispatch.get_backend() == "auto":
            raise
        raise UsageError(f"--backend: {first_line(error)}") from None
    return outputs, facts.dispatched(seen.choices)
