"""U-Nets of MONAI, as they are and fused."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.upconv.cases import FORMATS

_LEVELS = {"kernel_size": [3] * 5, "strides": [1] + [2] * 4, "upsample_kernel_size": [2] * 4}  # of DynUNet
_ARGUMENTS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_NETS = {"BasicUNet": {}, "DynUNet": _LEVELS}


@dataclass(frozen=True)
class Case:
    net: str
    B: int
    size: int = 256
    format: str = "nchw"
    dtype: str = "float32"
    direction: str = "forward"

    def __str__(self) -> str:
        return f"{self.net}-B{self.B}-{self.size}-{self.format}-{self.dtype}-{self.direction}".replace(" ", "-")

    @property
    def training(self) -> bool:
        return self.direction == problem.TRAINING


def _sweep(batches: tuple[int, ...], sizes: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Case]:
    passes = [(dtype, direction) for dtype in dtypes for direction in ("forward", problem.TRAINING)]
    return [Case(n, b, s, f, *kind) for kind in passes for n in _NETS for s in sizes for b in batches for f in FORMATS]


COST = 3
CASES = {
    "smoke": [],
    "quick": [Case("BasicUNet", 1)],
    "full": _sweep((1, 2, 4), (256, 512), ("float32", "bfloat16")),
    "gpu": _sweep((32,), (256, 512), ("bfloat16",)),
}


def test_unet(case: Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile in ("full", "gpu")))


def _problem(case: Case, with_compile: bool) -> Problem:
    from monai.networks import nets  # takes seconds

    torch.manual_seed(0)
    dtype, format = problem.dtype_of(case.dtype), FORMATS[case.format]
    model = getattr(nets, case.net)(**_ARGUMENTS, **_NETS[case.net]).train(case.training)
    model = model.to(problem.device(), dtype, memory_format=format)
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    tokenfusion.fuse(fused, strict=True)

    def images(channels: int) -> torch.Tensor:
        shape = case.B, channels, case.size, case.size
        return torch.randn(shape, device=problem.device(), dtype=dtype).contiguous(memory_format=format)

    def inputs():
        return (images(1).requires_grad_(), images(2)) if case.training else (images(1),)

    def call(function, module):
        if case.training:
            return problem.forward_backward(function, module.parameters())
        return problem.forward(function)

    x, weight = inputs()[0], torch.empty(1, 1, 2, 2, device=problem.device(), dtype=dtype)
    variants = [Variant(problem.EAGER, call(model, model))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(model), model)))
    for backend in problem.kernels_for("upconv_concat", x, weight):
        variants.append(Variant(problem.package(backend), call(fused, fused), backend))
        if with_compile:
            function = call(problem.compiled(fused), fused)  # plain up-convolutions are compiled
            variants.append(Variant(problem.package(backend) + problem.AND_COMPILE, function))
    with FlopCounterMode(display=False) as counter:
        call(model, model)(*(tensor[:1] for tensor in inputs()))
    return Problem(
        "U-Nets of MONAI",
        asdict(case),
        variants,
        inputs,
        call(exact, exact),
        moved=sum(t.nbytes for t in (*model.parameters(), *inputs())),
        written=case.training,
        flops=case.B * counter.get_total_flops(),
    )
