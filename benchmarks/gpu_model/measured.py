"""What records of real GPUs say of the calls that the model predicts."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_model.devices import DEVICES, Device
from benchmarks.gpu_model.facts import FORWARD, Call
from benchmarks.report import record

_TRAINING = "forward + backward"  # as rows of records have it


@dataclass(frozen=True)
class Measured:
    """A row of a record beside its prediction. error: how much longer it took than was predicted, 0.1 for 10 %."""

    record: str
    device: Device
    calls: str  # the direction of the row
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        return self.seconds / self.predicted - 1


def records(folder: Path = record.RECORDS) -> list[tuple[str, Device, list[dict]]]:
    """(file, GPU, rows) of the records of GPUs that the model knows."""
    found = []
    for path in sorted(folder.glob("*.json")):
        loaded = record.load(path)
        device = _device(loaded["conditions"]["device"])
        if device is not None:
            found.append((path.name, device, loaded["rows"]))
    return found


def _device(described: dict) -> Device | None:
    if described["kind"] != "cuda":
        return None
    return next((device for device in DEVICES.values() if device.name in described["name"].upper()), None)


def beside(call: Call, calls: list[Call], found: list[tuple[str, Device, list[dict]]]) -> list[Measured]:
    """A record has no backward pass alone: beside that stands the forward pass with it."""
    passes, direction = [call], FORWARD
    if call.direction != FORWARD:
        passes += [each for each in calls if _same_but_direction(each, call) and each.direction == FORWARD]
        direction = _TRAINING
        if len(passes) == 1:
            return []
    case = call.sizes | {"dtype": call.dtype, "direction": direction}
    return [
        Measured(name, device, direction, row["seconds"], sum(each.on(device).seconds for each in passes))
        for name, device, rows in found
        for row in rows
        if row["group"] == f"{call.operator}, the op" and row["backend"] == call.backend
        if row["case"] == case and not row["fault"] and not row["variant"].endswith("+ compile")
    ]


def _same_but_direction(*calls: Call) -> bool:
    one, other = ((call.operator, call.backend, call.dtype, call.sizes) for call in calls)
    return one == other
