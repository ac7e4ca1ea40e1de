"""Training steps of networks beside those of their parameter-efficient forms, which are other networks."""

from dataclasses import asdict, dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion.models  # noqa: F401  (registers the models)
from benchmarks import problem
from benchmarks.problem import TRAINING, Problem, Variant
from tokenfusion.layers import TiedFFN

_FORMS = {
    "resnet50": ("resnet50_pe1", "resnet50_pe2"),
    "deit_small_patch16_224": ("vit_pe_small_patch16_224",),
}


@dataclass(frozen=True)
class Case:
    model: str
    B: int
    dtype: str = "float32"
    direction: str = TRAINING

    def __str__(self) -> str:
        return f"{self.model}-B{self.B}-{self.dtype}-{self.direction}".replace(" + ", "+")


CASES = {
    "smoke": [],
    "quick": [Case(model, 4) for model in _FORMS],
    "full": [Case(model, batch, dtype) for model in _FORMS for dtype in ("float32", "bfloat16") for batch in (8, 32)],
}


def test_pe_baselines(case: Case, run):
    run(_problem(case))


def _problem(case: Case) -> Problem:
    def training_step(name: str, dtype: torch.dtype):
        torch.manual_seed(0)
        model = timm.create_model(name).to(problem.device(), dtype)
        return model, problem.forward_backward(model, model.parameters())

    def inputs():
        images = torch.randn(case.B, 3, 224, 224, device=problem.device(), dtype=dtype, requires_grad=True)
        return images, torch.randn(case.B, 1000, device=problem.device(), dtype=dtype)

    dtype = problem.dtype_of(case.dtype)
    model, step = training_step(case.model, dtype)
    variants = [Variant(problem.EAGER, step)]
    for form in _FORMS[case.model]:
        form_model, form_step = training_step(form, dtype)
        for backend in _backends(form_model):
            variants.append(Variant(form, form_step, backend, another_network=True))
    with FlopCounterMode(display=False) as counter:
        step(*(t[:2] for t in inputs()))
    return Problem(
        f"{case.model} beside its parameter-efficient forms, other networks: a training step without the optimizer",
        asdict(case),
        variants,
        inputs,
        training_step(case.model, torch.float64)[1],
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
