"""tokenfusion info: versions, what was built, what can run here and why the rest cannot."""

import json

from tokenfusion import environment
from tokenfusion.cli.display import console, show, table
from tokenfusion.kernels import dispatch, extension

_BY_NAME = "by name only until a GPU record exists"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("info", help="versions, what was built, and what can run here")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args) -> int:
    facts = environment.collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def _state(implementation: dict | None) -> str:
    if implementation is None:
        return "no implementation for this backend"
    notes = [implementation["reason"], None if implementation["automatic"] else _BY_NAME]
    return "; ".join(filter(None, notes)) or "runs"


def _built(build: dict, isa: str | None) -> list[tuple[str, str]]:
    """Part of the extension -> what it was built for, or why it was not."""
    why_not = extension.why_not()
    if why_not is not None:
        cpp = why_not
    else:
        isas = ", ".join(build["cpp"]["isas"])
        cpp = f"built for torch {build['torch']} by {build['compiler']}: {isas}; {isa} runs here"
    if build and build["cuda"]["built"]:
        cuda = f"built by nvcc {build['cuda']['nvcc']}: {', '.join(build['cuda']['archs'])}"
    else:
        cuda = extension.why_not_cuda()
    return [("C++ extension", cpp), ("CUDA kernels", cuda)]


def _tuning(tuning: dict) -> list[tuple[str, str]]:
    if tuning["file"] is None:
        rows = [("file", "none; tokenfusion tune makes one for this machine")]
    else:
        rows = [("file", f"{tuning['file']}, {tuning['choices']} choices, digest {tuning['digest']}")]
    if tuning["remark"] is not None:
        rows.append(("remark", tuning["remark"]))
    return rows + [("ignored", reason) for reason in tuning["ignored"]]


def _print(facts: dict) -> None:
    sections = [
        ("Versions", [(name, version or "none") for name, version in facts["versions"].items()]),
        ("Built", _built(facts["build"], facts["isa"])),
        (
            "Backends",
            [
                ("chosen", f"{facts['backend']}; for the whole process: {facts['backend of the process']}"),
                *((name, entry["reason"] or "runs") for name, entry in facts["backends"].items()),
            ],
        ),
    ]
    sections.append(("Tuning", _tuning(facts["tuning"])))
    for name, implementations in facts["operators"].items():
        rows = [(backend, _state(implementations.get(backend))) for backend in dispatch.BACKENDS]
        sections.append((name, rows))
    names = max(len(name) for _, rows in sections for name, _ in rows)
    out = console()
    for title, rows in sections:
        show(out, table(title, ("", ""), [(name.ljust(names), state) for name, state in rows]))
