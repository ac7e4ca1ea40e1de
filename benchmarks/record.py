"""A record: the conditions of a run and its rows, as JSON."""

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks import timing
from tokenfusion.cli import info

_ROOT = Path(__file__).parent.parent


def conditions(profile: str) -> dict:
    facts = info.collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "profile": profile,
        "device": _device(),
        "versions": facts["versions"],
        "isa": facts["isa"],
        "commit": _commit(),
        "cache": timing.policy(),
    }


def save(path: Path | None, conditions: dict, rows: list[dict]) -> Path:
    path = path or _default_path(conditions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    return path


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def file_name(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def summary(conditions: dict) -> str:
    """The conditions in a few lines."""
    device, versions = conditions["device"], conditions["versions"]
    installed = ", ".join(f"{name} {versions[name]}" for name in ("tokenfusion", "torch", "triton", "timm"))
    parts = [device["name"], f"{device['threads']} threads", conditions["isa"], device["driver"]]
    return "\n".join(
        (
            ", ".join(str(part) for part in parts if part),
            f"{installed}, commit {conditions['commit']}, {conditions['date']}, profile {conditions['profile']}",
            f"{conditions['cache']}; variants in turn in every round, x = median of the ratios round by round",
        )
    )


def _default_path(conditions: dict) -> Path:
    name = file_name(f"{conditions['device']['name']} {conditions['date'].split('+')[0]}")
    return _ROOT / "benchmarks" / "results" / f"{name}.json"


def _device() -> dict:
    gpu = torch.cuda.is_available()
    return {
        "kind": "cuda" if gpu else "cpu",
        "name": torch.cuda.get_device_name() if gpu else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, marked where files differ from it."""
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
