"""Predictions for a terminal, and as a table in Markdown."""

import itertools
import re
import textwrap
from pathlib import Path

from benchmarks.gpu_model import facts
from benchmarks.gpu_model.access import SECTOR
from benchmarks.gpu_model.devices import DEVICES, Device
from benchmarks.gpu_model.facts import Call
from benchmarks.gpu_model.limits import Launch, Limits, limits
from benchmarks.gpu_model.machine_code import KINDS
from benchmarks.gpu_model.measured import Measured, beside, records
from benchmarks.report.table import COLUMNS

_TABLE = re.compile(r"(<!-- prediction (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_COLUMN = 8
_INDENT = 6 * " "
H100 = DEVICES["h100"]


def text(call: Call, devices: list[Device], measured: list[Measured]) -> str:
    parts = [str(call), f"  must move {_megabytes(call.must_move)} MB"]
    parts += [f"  {each.name}: the operator takes less" for each in devices if each.capability not in call.launches]
    devices = [each for each in devices if each.capability in call.launches]
    for capability in dict.fromkeys(device.capability for device in devices):
        parts.append(f"  sm_{capability}, {len(call.launches[capability])} launches")
        for launch in call.launches[capability]:
            parts += _launch(launch, call)
            found = [(device, limits(launch, device)) for device in devices if device.capability == capability]
            parts += _limits(found)
    for device in devices:
        found = call.on(device)
        parts.append(
            f"  {device.name}: predicted {_microseconds(found.seconds)} us, {found.share:.0%} of copy bandwidth,"
            f" bound by {found.binding}"
        )
    parts += [f"  {line}" for line in map(_measured, measured)]
    return "\n".join(parts)


def _launch(launch: Launch, call: Call) -> list[str]:
    moved = f"memory: {_megabytes(launch.read)} MB read, {_megabytes(launch.written)} MB written"
    if launch.blocks == 0:
        return [f"    {launch.kernel}, {moved}"]
    kinds = [f"{kind} {launch.instructions[kind] / call.units:.0f}" for kind in KINDS if launch.instructions.get(kind)]
    said = (
        f"{launch.blocks} blocks of {launch.warps} warps, {launch.registers} registers, {launch.spilled} bytes spilled,"
        f" {launch.shared / 1024:.1f} KB of shared memory",
        moved,
        f"L2: {_megabytes(SECTOR * launch.through_l2)} MB, for accesses to {_megabytes(SECTOR * launch.sectors)} MB in"
        f" sectors, {launch.sectors / max(launch.accesses, 1):.1f} each, {launch.useful / max(launch.sectors, 1):.1f}"
        f" bytes of one useful; {launch.partial / 1e6:.2g} M are stored in part",
        f"{call.a_unit}: {launch.issued / call.units:.0f} warp instructions ({launch.ptx / call.units:.0f} of PTX,"
        f" moves left out): {', '.join(kinds)}",
        f"{call.a_unit}: {launch.wavefronts / call.units:.0f} wavefronts of shared memory,"
        f" {launch.without_conflicts / call.units:.0f} without bank conflicts",
        *([f"products: {sum(launch.flops.values()) / 1e9:.3g} GFLOP"] if launch.flops else []),
    )
    lines = (textwrap.wrap(each, COLUMNS, initial_indent=_INDENT, subsequent_indent=_INDENT + "  ") for each in said)
    return [f"    {launch.kernel}", *itertools.chain(*lines)]


def _limits(found: list[tuple[Device, Limits]]) -> list[str]:
    names = list(dict.fromkeys(name for _, each in found for name in each.seconds))
    head = "".join(f"{_SHORT.get(name, name):>{_COLUMN}}" for name in names)
    lines = [f"{_INDENT}{'us':<6}{head}"]
    for device, each in found:
        row = "".join(f"{_microseconds(each.seconds[name]):>{_COLUMN}}" for name in names)
        lines.append(f"{_INDENT}{device.name:<6}{row}")
        if each.blocks_per_multiprocessor:
            lines.append(
                f"{_INDENT}  {each.blocks_per_multiprocessor} blocks on a multiprocessor, {each.waves:.2f} waves,"
                f" {each.issue_share:.0%} of issue slots, {each.binding} binds"
            )
    return lines


_SHORT = {"shared memory": "shared", "L1 lookups": "L1", "matrix products": "matrix"}


def _measured(found: Measured) -> str:
    return (
        f"{found.record}, {found.calls}: measured {_microseconds(found.seconds)} us, predicted"
        f" {_microseconds(found.predicted)} us, {found.error:+.0%}"
    )


def updated(document: str) -> str:
    """The text of a document with its marked tables made from the counts that they name."""

    def table_of(block: re.Match) -> str:
        begin, path, _, end = block.groups()
        return f"{begin}\n{table(facts.load(Path(path))[0], records())}\n\n{end}"

    return _TABLE.sub(table_of, document)


def table(calls: list[Call], found: list[tuple[str, Device, list[dict]]]) -> str:
    """A line for each call: what limits it on an H100, and the share of copy bandwidth that is predicted."""
    names = [device.name for device in DEVICES.values()]
    head = ("call", "warp instructions", "useful bytes a sector", "bound by, H100", "predicted us, H100")
    head += tuple(f"share, {name}" for name in names) + ("measured us",)
    lines = [f"| {' | '.join(head)} |", "|:--|--:|--:|:--|" + "--:|" * (len(names) + 2)]
    for call in calls:
        launches = call.launches[H100.capability]
        issued, sectors, useful = (sum(getattr(each, name) for each in launches) for name in _SUMMED)
        on = call.on(H100)
        cells = (
            str(call),
            f"{issued / call.units:.0f} {call.a_unit}",
            f"{useful / max(sectors, 1):.0f}",
            on.binding,
            _microseconds(on.seconds),
            *(_share(call, device) for device in DEVICES.values()),
            "; ".join(map(_measured_cell, beside(call, calls, found))) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_SUMMED = ("issued", "sectors", "useful")


def _share(call: Call, device: Device) -> str:
    return f"{call.on(device).share:.0%}" if device.capability in call.launches else "-"


def _measured_cell(found: Measured) -> str:
    return f"{_microseconds(found.seconds)} ({found.device.name}, {found.calls}: {found.error:+.0%})"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.1f}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g}" if count < 1e9 else f"{count / 1e6:.0f}"
