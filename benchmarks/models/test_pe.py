"""Training steps of ViT-PE, with this package's tied feed-forward networks and with the same formula in PyTorch."""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion.models  # noqa: F401  (registers the model)
from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Problem, Variant
from benchmarks.models.cases import Case

_NAME = "vit_pe_small_patch16_224"

COST = 3
CASES = {
    "smoke": [],
    "quick": [Case(_NAME, 2, direction=TRAINING)],
    "gpu": [Case(_NAME, 64, "bfloat16", TRAINING)],
    "full": [Case(_NAME, batch, dtype, TRAINING) for dtype in ("float32", "bfloat16") for batch in (2, 8, 32)],
}


def test_vit_pe(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    dtype = case.torch_dtype
    model = timm.create_model(case.model).to(problem.device(), dtype)
    exact = timm.create_model(case.model).double().to(problem.device())
    exact.load_state_dict(model.state_dict())

    def inputs():
        images = torch.randn(case.B, 3, 224, 224, device=problem.device(), dtype=dtype, requires_grad=True)
        return images, torch.randn(case.B, 1000, device=problem.device(), dtype=dtype)

    def in_pytorch(function):
        return problem.on_reference(problem.passes(function, case.backward))

    step = problem.passes(model, case.backward)
    variants = [Variant(problem.EAGER, in_pytorch(model))]
    if "eager" in compiles:
        variants.append(Variant(problem.COMPILED, in_pytorch(problem.compiled(model))))
    for backend in problem.kernels_for("tied_ffn", *_ffn_tensors(model)):
        variants.append(Variant(problem.package(backend), step, backend))
    with FlopCounterMode(display=False) as counter:
        in_pytorch(model)(*(t[:1] for t in inputs()))
    return Problem(
        "ViT-PE, a training step without the optimizer",
        case.sizes(),
        variants,
        inputs,
        in_pytorch(exact),
        moved=3 * sum(t.nbytes for t in (*model.parameters(), *inputs())),
        written=True,
        flops=case.B * counter.get_total_flops(),
    )


def _ffn_tensors(model) -> tuple[torch.Tensor, ...]:
    ffn = model.blocks[0].mlp
    return ffn.weight[:1], ffn.weight, ffn.bias_in, ffn.bias_out
