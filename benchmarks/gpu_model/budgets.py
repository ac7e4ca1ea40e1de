"""What a kernel may cost: what it cost when the budgets were written, and HEADROOM."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_model.facts import Call

CAPABILITY = 90
HEADROOM = 0.05
_REGENERATE = "python -m benchmarks.gpu_model --budgets {}"


def costs(call: Call) -> dict[str, dict[str, float]]:
    """Of each kernel that a call launches, in its order. Counts are for the call's unit, a token or a row."""
    kernels = [launch for launch in call.launches[CAPABILITY] if launch.blocks]
    return {
        f"{number} {launch.kernel}": {
            f"warp instructions {call.a_unit}": launch.issued / call.units,
            f"shared-memory wavefronts {call.a_unit}": launch.wavefronts / call.units,
            f"sectors {call.a_unit}": launch.sectors / call.units,
            "sectors an access": launch.sectors / launch.accesses,
            "registers": launch.registers,
            "bytes spilled": launch.spilled,
        }
        for number, launch in enumerate(kernels)
    }


def save(path: Path, counted: Iterable[tuple[Call, dict[str, str]]]) -> None:
    """counted: calls, each with the versions of the compilers."""
    calls, versions = zip(*counted, strict=True)
    budgets = {str(call): {kernel: _rounded(of) for kernel, of in costs(call).items()} for call in calls}
    path.write_text(json.dumps({"versions": versions[0], "budgets": budgets}, indent=1) + "\n")


def _rounded(costs: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{cost:.4g}") for name, cost in costs.items()}


def exceeded(call: Call, path: Path) -> list[str]:
    """What costs more than the file allows, in words."""
    allowed, found = json.loads(path.read_text())["budgets"].get(str(call), {}), costs(call)
    if list(allowed) != list(found):
        return [f"{call} launches {', '.join(found)}, and there is a budget for {', '.join(allowed)}"]
    return [
        f"{call}, {kernel}: {cost:.4g} {name}, {cost / allowed[kernel][name] - 1:+.0%} of {allowed[kernel][name]:g}"
        if allowed[kernel][name]
        else f"{call}, {kernel}: {cost:.4g} {name}, none is allowed"
        for kernel, of in found.items()
        for name, cost in of.items()
        if cost > (1 + HEADROOM) * allowed[kernel][name]
    ]


def regenerate(path: Path) -> str:
    return _REGENERATE.format(path)
