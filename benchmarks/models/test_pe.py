"""Training steps of ViT-PE, with this package's tied feed-forward networks and with the same formula in PyTorch."""

from dataclasses import asdict

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
import tokenfusion.models  # noqa: F401  (registers the model)
from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Problem, Variant
from benchmarks.models.cases import Case

_NAME = "vit_pe_small_patch16_224"


CASES = {
    "smoke": [],
    "quick": [Case(_NAME, 2, direction=TRAINING)],
    "full": [Case(_NAME, batch, dtype, TRAINING) for dtype in ("float32", "bfloat16") for batch in (2, 8, 32)],
}


def test_vit_pe(case: Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile == "full"))


def _problem(case: Case, with_compile: bool) -> Problem:
    torch.manual_seed(0)
    dtype = problem.dtype_of(case.dtype)
    model = timm.create_model(case.model).to(problem.device(), dtype)
    exact = timm.create_model(case.model).double().to(problem.device())
    exact.load_state_dict(model.state_dict())

    def inputs():
        images = torch.randn(case.B, 3, 224, 224, device=problem.device(), dtype=dtype, requires_grad=True)
        return images, torch.randn(case.B, 1000, device=problem.device(), dtype=dtype)

    def in_pytorch(function, module):
        call = problem.forward_backward(function, module.parameters())

        def with_reference(*tensors):
            with tokenfusion.backend("reference"):
                return call(*tensors)

        return with_reference

    variants = [Variant(problem.EAGER, in_pytorch(model, model))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, in_pytorch(problem.compiled(model), model)))
    for backend in problem.kernels_for("tied_ffn", *_ffn_tensors(model)):
        variants.append(Variant(problem.package(backend), problem.forward_backward(model, model.parameters()), backend))
    with FlopCounterMode(display=False) as counter:
        in_pytorch(model, model)(*(t[:1] for t in inputs()))
    return Problem(
        "ViT-PE, a training step without the optimizer",
        asdict(case),
        variants,
        inputs,
        in_pytorch(exact, exact),
        moved=3 * sum(t.nbytes for t in (*model.parameters(), *inputs())),
        written=True,
        flops=case.B * counter.get_total_flops(),
    )


def _ffn_tensors(model) -> tuple[torch.Tensor, ...]:
    ffn = model.blocks[0].mlp
    return ffn.weight[:1], ffn.weight, ffn.bias_in, ffn.bias_out
