"""Training steps of networks beside those of their parameter-efficient forms, which are other networks."""

from functools import partial

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion.models  # noqa: F401  (registers the models)
from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Problem, Variant
from benchmarks.models.cases import Case
from tokenfusion.layers import TiedFFN

_FORMS = {
    "resnet50": ("resnet50_pe1", "resnet50_pe2"),
    "deit_small_patch16_224": ("vit_pe_small_patch16_224",),
}

COST = 3
CASES = {
    "smoke": [],
    "quick": [Case(model, 2, direction=TRAINING) for model in _FORMS],
    "full": [Case(m, b, dtype, TRAINING) for m in _FORMS for dtype in ("float32", "bfloat16") for b in (2, 8, 32)],
}


def test_pe_baselines(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    def created(name: str, dtype: torch.dtype):
        torch.manual_seed(0)
        return timm.create_model(name).to(problem.device(), dtype)

    def inputs():
        images = torch.randn(case.B, 3, 224, 224, device=problem.device(), dtype=dtype, requires_grad=True)
        return images, torch.randn(case.B, 1000, device=problem.device(), dtype=dtype)

    dtype = case.torch_dtype
    model, exact = created(case.model, dtype), created(case.model, torch.float64)
    training_step = partial(problem.passes, backward=case.backward)
    step = training_step(model)
    variants = [Variant(problem.EAGER, step)]
    if "eager" in compiles:
        variants.append(Variant(problem.COMPILED, training_step(problem.compiled(model))))
    for name in _FORMS[case.model]:
        form = created(name, dtype)
        for backend in _backends(form):
            variants.append(Variant(name, training_step(form), backend, another_network=True))
            if "fused" in compiles:
                function = training_step(problem.compiled(form))
                variants.append(Variant(name + problem.AND_COMPILE, function, backend, another_network=True))
    with FlopCounterMode(display=False) as counter:
        step(*(t[:2] for t in inputs()))
    return Problem(
        f"{case.model} beside its parameter-efficient forms, other networks: a training step without the optimizer",
        case.sizes(),
        variants,
        inputs,
        training_step(exact),
        moved=3 * sum(t.nbytes for t in (*model.parameters(), *inputs())),
        written=True,
        flops=case.B * counter.get_total_flops() // 2,
    )


def _backends(model) -> list[str | None]:
    """Those of the feed-forward networks' operator; a ResNet has none, and its convolutions are PyTorch's."""
    ffn = next((module for module in model.modules() if isinstance(module, TiedFFN)), None)
    if ffn is None:
        return [None]
    return problem.kernels_for("tied_ffn", ffn.weight[:1], ffn.weight, ffn.bias_in, ffn.bias_out)[:1]
