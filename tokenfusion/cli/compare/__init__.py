"""tokenfusion compare: a model and its fused form side by side on photographs, in results, time and memory."""

import argparse
from pathlib import Path

import torch

from tokenfusion.kernels import dispatch

_DTYPES = ("float32", "bfloat16", "float16")
_MOST = 1_000_000  # images in a batch, and rounds


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="a model and its fused form side by side: results, time, memory",
        description="Classifies photographs with a timm model, fuses a copy of it, and compares the two: results, then "
        "time and peak memory of the fused modules alone and of the whole model, each eager and under torch.compile. "
        "A model of this package is set beside its plain form of the same weights.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        default="crossvit_15_240",
        help="any model of timm or of tokenfusion (%(default)s)",
    )
    add("images", metavar="IMAGE", nargs="*", help="image files (scikit-learn's two sample photographs)")
    add("--batch-size", metavar="N", type=_count, default=4, help="images in a timed batch (%(default)s)")
    add("--dtype", choices=_DTYPES, default="float32", help="(%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="(here: %(default)s)")
    add("--rounds", metavar="N", type=_count, default=10, help="timed calls of each variant (%(default)s)")
    add("--backend", choices=("auto", *dispatch.BACKENDS), help=f"of the fused modules ({dispatch.get_backend()})")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out, which takes minutes")
    add("--json", metavar="FILE", type=Path, help="also write every number to FILE")


def run(args) -> int:
    from tokenfusion.cli.compare import comparison  # imports timm, which arguments and --help need not wait for

    comparison.run(args)
    return 0


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 to {_MOST}")
    return number
