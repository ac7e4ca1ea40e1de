"""The calls that `tune` and `verify` go through: a model's own, those of a file, or the package's list."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tokenfusion.cli.errors import UsageError, first_line, printable

_DTYPES = ("float32", "bfloat16", "float16")
_MOST = 1_000_000  # images in a batch
_KINDS = tuple((dtype, direction) for dtype in _DTYPES for direction in ("inference", "training"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        help="the calls of this model of timm or tokenfusion, fused (the usual ones)",
    )
    add("--calls", metavar="FILE", type=Path, help="the calls of a file of a list of [operator, kind, sizes], in JSON")
    add("--batch", metavar="N,N", type=_batches, help="batches of the model (1,8)")
    add("--dtype", choices=_DTYPES, action="append", help="of these alone; can be given twice (float32, bfloat16)")


def chosen(args, train: bool = True, infer: bool = True) -> list:
    """
    Raises:
        UsageError: an argument that cannot be used, or no call that is left.
    """
    from tokenfusion.tuning.shipped import WORKLOADS

    if args.model is not None and args.calls is not None:
        raise UsageError("--calls: a model is named, too; expected one of both")
    if args.batch is not None and args.model is None:
        raise UsageError("--batch: no model is named; the calls of a list have batches of their own")
    if args.model is not None:
        found = _of_model(args, train, infer)
    else:
        found = WORKLOADS if args.calls is None else _of_file(args.calls)
        wanted = {"training": train, "inference": infer}
        found = [workload for workload in found if wanted[workload.kind[1]]]
        found = [workload for workload in found if not args.dtype or workload.kind[0] in args.dtype]
    if not found:
        raise UsageError(f"{args.model or args.calls or '--dtype'}: there is no call of an operator to measure")
    return found


def _of_model(args, train: bool, infer: bool) -> list:
    """Random weights: the time of a call does not depend on them."""
    import timm
    import torch

    import tokenfusion
    from tokenfusion.cli.compare import models
    from tokenfusion.tuning import machine, search

    models.check_name(args.model)
    found = {}
    for dtype in args.dtype or ("float32", "bfloat16"):
        try:
            model = timm.create_model(args.model).to(machine.device(), getattr(torch, dtype))
        except (OSError, RuntimeError, ValueError, TypeError, ImportError, AssertionError) as error:
            raise UsageError(f"MODEL: timm cannot build {args.model}: {first_line(error)}") from None
        tokenfusion.fuse(model)
        size = model.pretrained_cfg["input_size"]
        for batch in args.batch or (1, 8):
            images = torch.randn(batch, *size, device=machine.device(), dtype=getattr(torch, dtype))
            found |= dict.fromkeys(search.workloads_of(model, (images,), trains=train, infers=infer))
    return list(found)


def _of_file(path: Path) -> list:
    from tokenfusion.tuning.files import workload_of

    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(listed, list):
            raise ValueError(f"got {type(listed).__name__}, expected a list")
        entries = [dict(zip(("operator", "kind", "sizes"), each, strict=True)) for each in listed]
        found = [workload_of(entry) for entry in entries]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--calls: {printable(path)}: {first_line(error)}") from None
    for workload in found:
        if not _can_be_made(workload):
            raise UsageError(f"--calls: {printable(path)}: {list(workload)} is no call of an operator that is measured")
    return found


def _can_be_made(workload) -> bool:
    """Tried at small sizes."""
    from tokenfusion.kernels.dispatch import OPERATORS
    from tokenfusion.tuning import proof

    operator = OPERATORS.get(workload.operator)
    if operator is None or operator.workloads is None or workload.kind[:2] not in _KINDS:
        return False
    if len(workload.sizes) != len(operator.workloads.names) or min(workload.sizes) < 1:
        return False
    small = workload._replace(sizes=(8,) * len(workload.sizes))
    try:
        made = proof.call_of(operator, small, "cpu")
    except Exception:  # noqa: BLE001  (words of a kind that the operator does not have)
        return False
    return set(operator.workload(*made.selecting).kind) == set(workload.kind)


def name(workload) -> tuple[str, str]:
    """The operator, and the call in words."""
    from tokenfusion.kernels.dispatch import OPERATORS

    names = OPERATORS[workload.operator].workloads.names
    sizes = (f"{name} {size}" for name, size in zip(names, workload.sizes, strict=True))
    return workload.operator, ", ".join((*workload.kind, *sizes))


def rows_of_choices(findings: Sequence) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for finding in findings:
        medians = sorted(finding.seconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in medians)
        instead = "" if finding.choice == finding.built_in else f"{finding.gain:.2f}x of {finding.built_in}"
        rows.append((*name(finding.workload), finding.choice or "-", instead, times))
    return ("operator", "call", "chosen", "gain", "medians"), rows


def rows_of_skipped(findings: Sequence) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("operator", "call", "because"), [(*name(finding.workload), finding.skipped) for finding in findings]


def rows_of_refusals(findings: Sequence) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [(*name(finding.workload), *each) for finding in findings for each in finding.wrong.items()]
    return ("operator", "call", "refused", "because"), rows


def _duration(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in (("s", 1), ("ms", 1e-3)) if seconds >= size), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def _batches(text: str) -> tuple[int, ...]:
    numbers = [int(part) if part.isdecimal() and len(part) < 20 else 0 for part in text.split(",")]
    if not all(1 <= number <= _MOST for number in numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers from 1 to {_MOST}, with commas between")
    return tuple(numbers)
