"""What `tokenfusion compare` prints, from the plain data that it also writes as JSON."""

import os
from collections import Counter

from rich.console import Console

from tokenfusion.cli.compare import facts, timing
from tokenfusion.cli.display import show, table
from tokenfusion.kernels import dispatch
from tokenfusion.surgery import FuseReport


def print_conditions(out: Console, facts: dict) -> None:
    device = facts["device_name"]
    if facts["device"] == "cpu":
        device += f", {_count(facts['threads'], 'thread')}, ATen for {facts['aten_cpu_capability']}"
    size = " x ".join(map(str, facts["image_size"]))
    rows = [
        ("weights", facts["weights"]),
        ("eager", facts["eager"]),
        ("device", device),
        ("versions", ", ".join(f"{name} {facts[name]}" for name in ("tokenfusion", "torch", "timm"))),
        ("timed", f"{facts['dtype']}, batch {facts['batch_size']}, images {size}, {_count(facts['rounds'], 'round')}"),
    ]
    load, cores = facts["load_average"], os.cpu_count()
    if load is not None and load > cores / 2:
        rows.append(("load", f"{load:.1f} on {cores} cores before it starts: expect noisy times"))
    show(out, table(facts["model"], ("", ""), rows))


def print_top(out: Console, classified: list[dict], pretrained: bool) -> None:
    remarks = [entry["remark"] for entry in classified if entry["remark"]]
    if not any(entry["top"] for entry in classified):
        show(out, "The model has no classifier: its features are compared.", *remarks)
        return
    rows = []
    for entry in classified:
        for i, guess in enumerate(entry["top"]):
            rows.append(("" if i else entry["image"], guess["label"], f"{guess['probability']:.1%}"))
    columns = ("image", "label", "probability")
    if not pretrained:
        remarks.append("The weights are random, so these labels mean nothing.")
    show(out, table("What the model sees", columns, rows, numbers=columns[2:]), *remarks)


def print_modules(out: Console, report: FuseReport) -> None:
    if not report.modules:
        show(out, f"{report}; only the model as it is is timed.")
        return
    outcomes = Counter(
        (module.kind, f"replaced ({module.op})" if module.replaced else f"left alone: {module.reason}")
        for module in report.modules
    )
    rows = [(str(count), kind, outcome) for (kind, outcome), count in outcomes.items()]
    show(out, table("Modules that tokenfusion.fuse knows", ("count", "kind", "outcome"), rows, numbers=("count",)))


def print_differences(out: Console, difference: dict, dtype: str, images: int) -> None:
    described = {"fused_from_eager": "fused against eager"}
    if dtype != "float32":
        described["eager_from_float32"] = f"eager in {dtype} against float32"
        described["fused_from_float32"] = f"fused in {dtype} against float32"
    columns = ("largest difference of an output", "absolute", "of the largest output")
    rows = [
        (text, f"{difference[name]['absolute']:.1e}", f"{difference[name]['relative']:.1e}")
        for name, text in described.items()
    ]
    same = difference["same_top_1"]
    agreement = [] if same is None else [f"The same top-1 class in {same} of {_count(images, 'image')}."]
    show(out, table("Outputs", columns, rows, numbers=columns[1:]), *agreement)


def print_backends(out: Console, chosen: dict[str, facts.Dispatched]) -> None:
    for name, choice in chosen.items():
        rows = [
            (implementation.backend, _backend_state(implementation, choice))
            for implementation in dispatch.OPERATORS[name].implementations
            if not implementation.form
        ]
        show(out, table(f"Backends of {name} (asked for: {dispatch.get_backend()})", ("", ""), rows))


def _backend_state(implementation: dispatch.Implementation, choice: facts.Dispatched) -> str:
    backend = implementation.backend
    if choice.calls[backend]:
        return f"runs {choice.calls[backend]} of {sum(choice.calls.values())} calls"
    by_name = "" if implementation.automatic else f"only by name, with --backend {backend}"
    return choice.why_not[backend] or by_name or "could run"


def print_timings(out: Console, title: str, timings: dict[str, dict]) -> None:
    columns = ["", "time [ms]", "fastest", "vs eager", "peak [MB]"]
    if timing.COMPILED in timings:
        columns[4:4] = ["vs compile"]
        columns.append("first [s]")
    rows = []
    for name, timed in timings.items():
        compiles = name in timing.THAT_COMPILE
        cells = {
            "": f"  {timing.AND_COMPILE}" if compiles else name,
            "time [ms]": _number(timed["median_seconds"], 1e3, ".2f"),
            "fastest": _number(timed["fastest_seconds"], 1e3, ".2f"),
            "vs eager": _number(timed["vs_eager"], 1, ".2f", "x"),
            "vs compile": _number(timed["vs_compile"], 1, ".2f", "x"),
            "peak [MB]": _number(timed["peak_extra_bytes"], 1e-6, ".2f"),
            "first [s]": _number(timed["first_call_seconds"], 1, ".1f") if compiles else "",
        }
        rows.append([cells[column] for column in columns])
    failures = [f"{name}: not available: {t['unavailable']}" for name, t in timings.items() if t["unavailable"]]
    show(out, table(title, columns, rows, numbers=columns[1:]), *failures)


def _number(value: float | None, scale: float, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def print_legend(out: Console, compiled: bool) -> None:
    first = ["first: the first call, which compiles."] if compiled else []
    show(
        out,
        "time: median over the rounds, in which the variants take turns; fastest: the best round.",
        "vs: how many times as fast, the median of the rounds' ratios; below 1.00x is slower.",
        "peak: the most memory that PyTorch's allocator holds in a call, beyond weights and inputs.",
        *first,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
