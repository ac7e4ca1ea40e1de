"""python -m benchmarks.convergence --out RECORD.json: every family trained eagerly, fused, and fused and compiled.

The same seed and batches of handwritten digits, float32 and bfloat16 autocast. What eager does when its sums are
ordered differently (one thread, channels_last, batches reversed) is the yardstick: a fused model should end no further
from eager than eager from itself. A plot lies beside the record. `--update FILE` makes the marked tables of a Markdown
file anew, which stand between <!-- convergence RECORD.json --> and <!-- end -->.
"""

import argparse
import json
from pathlib import Path

from benchmarks.convergence import show
from benchmarks.convergence.families import FAMILIES
from benchmarks.convergence.training import compare
from benchmarks.measure import environment
from benchmarks.measure.problem import device
from tokenfusion.cli.display import console
from tokenfusion.kernels.dispatch import BACKENDS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.split(":")[1].strip())
    parser.add_argument("--steps", type=int, default=200, help="at least 2")
    parser.add_argument("--only", metavar="WORD", help="the families whose names contain this")
    backend = "cpu" if device() == "cpu" else "triton"
    parser.add_argument(
        "--backend", default=backend, choices=BACKENDS[1:], help="of the operators of fused models (%(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("convergence.json"), help="the record")
    parser.add_argument("--update", type=Path, metavar="FILE", help="make the tables of this Markdown file anew, alone")
    args = parser.parse_args(arguments)
    if args.update:
        args.update.write_text(show.updated(args.update.read_text(encoding="utf-8")), encoding="utf-8")
        return
    chosen = [family for family in FAMILIES if (args.only or "").lower() in family.name.lower()]
    if not chosen:
        parser.error(f"--only: got {args.only!r}, the families are {', '.join(f.name for f in FAMILIES)}")
    if args.steps < 2:
        parser.error(f"--steps: got {args.steps}, expected at least 2")
    if args.out.suffix == ".png" or not args.out.absolute().parent.is_dir():
        parser.error(f"--out: {args.out} is a picture's name, or in no folder")
    rows = []
    with console().status("") as status:
        for family in chosen:
            for bfloat16 in (False, True):
                rows += compare(family, bfloat16, args.steps, args.backend, status.update)
    conditions = environment.collect(f"{args.steps} steps, backend {args.backend}")
    args.out.write_text(json.dumps({"conditions": conditions, "rows": rows}), encoding="utf-8")
    args.out.with_suffix(".png").write_bytes(show.plot(rows))
    print(show.table(rows))
    print(f"\n{args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
