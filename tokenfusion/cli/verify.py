"""tokenfusion verify: whether every kernel that can run on this machine is right."""

from tokenfusion.cli import workloads
from tokenfusion.cli.display import console, progress_bar, show, table


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="prove every kernel on this machine; exit status 1 if one is wrong",
        description="The proof of `tokenfusion tune` alone: results and gradients against float64 with at most twice "
        "the error of PyTorch, the same bits again, memory left alone. Times and writes nothing.",
    )
    workloads.add_arguments(parser)


def run(args) -> int:
    from tokenfusion import environment
    from tokenfusion.tuning import search

    chosen = workloads.chosen(args)
    with progress_bar("proving", total=len(chosen)) as step:
        proof = search.verify(chosen, report=lambda finding, done, total: step(f"{done} of {total}", advance=1))
    out = console()
    facts = environment.collect()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    show(out, f"{versions}; {facts['isa'] or 'no C++ extension'}")
    if proof.wrong:
        show(out, table("Wrong", *workloads.rows_of_refusals(proof.wrong)))
    skipped = [finding for finding in proof.findings if finding.skipped is not None]
    if skipped:
        show(out, table("Left out", *workloads.rows_of_skipped(skipped)))
    tried = len(proof.findings) - len(skipped)
    show(out, f"{tried} calls tried on every backend that runs here, {len(proof.wrong)} with a wrong one.")
    return 1 if proof.wrong else 0
