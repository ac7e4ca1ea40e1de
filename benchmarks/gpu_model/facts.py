"""What was counted of each call, as JSON, from which all predictions are made. Needs no torch."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_model.devices import DEVICES, Device
from benchmarks.gpu_model.limits import Launch, Prediction, limits

FORWARD, BACKWARD = "forward", "backward"
KEPT = Path(__file__).parent / "counted.json"
_DIGITS = 6


@dataclass(frozen=True)
class Call:
    """A case with its launches by compute capability."""

    operator: str
    backend: str
    direction: str
    dtype: str
    sizes: dict[str, int | str]
    unit: str
    units: int
    must_move: int
    launches: dict[int, list[Launch]]

    def __str__(self) -> str:
        return name(self)

    @property
    def a_unit(self) -> str:
        return f"a {self.unit}" if self.unit[0].isalpha() else f"for {self.unit}"

    def on(self, device: Device) -> Prediction:
        return Prediction.of(self.launches[device.capability], device, self.must_move)


def name(call) -> str:
    """Of a call, or of the case that it was made for."""
    sizes = (size if isinstance(size, str) else f"{letter}{size}" for letter, size in call.sizes.items() if size)
    return " ".join((call.operator, call.backend, call.direction, call.dtype, *sizes))


def save(path: Path, calls: Iterable[Call], versions: dict[str, str]) -> None:
    """With what is predicted, for readers: it is made anew from the rest."""
    content = {"versions": versions, "calls": [_rounded(asdict(call) | _predictions(call)) for call in calls]}
    text = json.dumps(content, indent=1)
    innermost = re.compile(r"(?<=[\[{])\s+([^\[\]{}]*?)\s+(?=[\]}])")
    path.write_text(innermost.sub(lambda match: re.sub(r"\s*\n\s*", " ", match[1]), text) + "\n")


def load(path: Path = KEPT) -> tuple[list[Call], dict[str, str]]:
    """Calls, and the versions of the compilers."""
    content = json.loads(path.read_text())
    calls = []
    for each in content["calls"]:
        launches = {int(c): [Launch(**launch) for launch in of] for c, of in each["launches"].items()}
        calls.append(Call(**{k: v for k, v in each.items() if k != "predictions"} | {"launches": launches}))
    return calls, content["versions"]


def _predictions(call: Call) -> dict:
    found = {}
    for name, device in DEVICES.items():
        if launches := call.launches.get(device.capability):
            each = [limits(launch, device) for launch in launches]
            found[name] = call.on(device).as_dict() | {"limits": [one.seconds for one in each]}
    return {"predictions": found}


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
