"""U-Nets of MONAI, as they are and fused."""

import copy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import CaseBase, Problem
from benchmarks.ops.upconv.cases import FORMATS

_LEVELS = {"kernel_size": [3] * 5, "strides": [1] + [2] * 4, "upsample_kernel_size": [2] * 4}  # of DynUNet
_ARGUMENTS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_NETS = {"BasicUNet": {}, "DynUNet": _LEVELS}


@dataclass(frozen=True)
class Case(CaseBase):
    net: str
    B: int
    size: int = 256
    format: str = "nchw"
    dtype: str = "float32"
    direction: str = "forward"


def _sweep(batches: tuple[int, ...], sizes: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Case]:
    passes = [(dtype, direction) for dtype in dtypes for direction in ("forward", problem.TRAINING)]
    return [Case(n, b, s, f, *kind) for kind in passes for n in _NETS for s in sizes for b in batches for f in FORMATS]


COST = 3
CASES = {
    "smoke": [],
    "quick": [Case("BasicUNet", 1)],
    "full": _sweep((1, 2, 4), (256, 512), ("float32", "bfloat16")),
    "gpu-full": _sweep((32,), (256, 512), ("bfloat16",)),
}


def test_unet(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    nets = pytest.importorskip("monai.networks.nets")  # takes seconds

    torch.manual_seed(0)
    dtype, format = case.torch_dtype, FORMATS[case.format]
    model = getattr(nets, case.net)(**_ARGUMENTS, **_NETS[case.net]).train(case.backward)
    model = model.to(problem.device(), dtype, memory_format=format)
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    tokenfusion.fuse(fused, strict=True)

    def images(channels: int) -> torch.Tensor:
        shape = case.B, channels, case.size, case.size
        return torch.randn(shape, device=problem.device(), dtype=dtype).contiguous(memory_format=format)

    def inputs():
        return (images(1).requires_grad_(), images(2)) if case.backward else (images(1),)

    timed = partial(problem.passes, backward=case.backward)
    x, weight = inputs()[0], torch.empty(1, 1, 2, 2, device=problem.device(), dtype=dtype)
    kernels = problem.kernels_for("upconv_concat", x, weight)
    variants = problem.variants(timed, model, fused, kernels, compiles=compiles)
    plain_again = [replace(v, backend=None) if v.name.endswith(problem.AND_COMPILE) else v for v in variants]
    with FlopCounterMode(display=False) as counter:
        timed(model)(*(tensor[:1] for tensor in inputs()))
    return Problem(
        "U-Nets of MONAI",
        case.sizes(),
        plain_again,  # plain up-convolutions are compiled
        inputs,
        timed(exact),
        moved=sum(t.nbytes for t in (*model.parameters(), *inputs())),
        written=case.backward,
        flops=case.B * counter.get_total_flops(),
    )
