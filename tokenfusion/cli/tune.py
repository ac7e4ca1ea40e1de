"""tokenfusion tune: proves and times what can run on this machine, and writes the file that "auto" follows."""

import argparse

from tokenfusion.cli import workloads
from tokenfusion.cli.display import console, progress_bar, show, table
from tokenfusion.cli.errors import UsageError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="prove and time every kernel on this machine; the fastest that is right is used from then on",
        description="Proves each backend and form of the operators that can run here (results and gradients against "
        "float64, the same bits again, memory left alone), times those that are right, and writes what is fastest to a "
        "file that every later process follows. What was measured is kept when it is interrupted; what is left comes "
        "first the next time.",
    )
    workloads.add_arguments(parser)
    parser.add_argument(
        "--minutes", metavar="N", type=_minutes, default=5.0, help="when to stop, within a call (%(default)g)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--train", action="store_true", help="calls in training alone")
    which.add_argument("--infer", action="store_true", help="calls in inference alone")


def run(args) -> int:
    from tokenfusion.tuning import files, search

    directions = {"train": not args.infer, "infer": not args.train}
    chosen = workloads.chosen(args, **directions)
    found = []
    interrupted = False
    try:
        with progress_bar(f"tuning, at most {args.minutes:g} minutes", total=len(chosen)) as step:

            def report(finding, done, total):
                found.append(finding)
                step(f"{done} of {total}", advance=1)

            path = search.tune(workloads=chosen, minutes=args.minutes, report=report, **directions).path
    except KeyboardInterrupt:
        interrupted, path = True, files.user_path()
    except OSError as error:
        raise UsageError(f"the file cannot be written: {error}; TOKENFUSION_TUNING names another one") from None
    out = console()
    measured = [finding for finding in found if finding.skipped is None]
    if measured:
        show(out, table("Chosen", *workloads.rows_of_choices(measured)))
    skipped = [finding for finding in found if finding.skipped is not None]
    if skipped:
        show(out, table("Left out", *workloads.rows_of_skipped(skipped)))
    refused = [finding for finding in found if finding.wrong]
    if refused:
        show(out, table("Refused", *workloads.rows_of_refusals(refused)))
    changed = sum(finding.choice != finding.built_in for finding in measured)
    done = f"{len(measured)} of {len(chosen)} calls measured"
    left = len(chosen) - len(found)
    show(
        out,
        f"{done}, of which {changed} run on something else than without the file."
        + (f" {left} are left: run it again with more --minutes." if left and not interrupted else ""),
        f"Written to {path}; in force from the next process on. TOKENFUSION_TUNING=0 leaves it out.",
    )
    if interrupted:
        raise KeyboardInterrupt
    return 1 if refused else 0


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 < minutes < 10_000:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of minutes above 0")
    return minutes
