"""single_query_attention over normalised tokens, beside the same formula in plain PyTorch.

The row "projections + SDPA" starts from the query before W_k is absorbed into it and ends after W_v; its output is
compared with the exact one brought to the same form. It has projections of all tokens to pay for, and the op does
not; the products of size [B, C] that absorb them are part of the layer's benchmark.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.single_query_attention import cases
from benchmarks.ops.single_query_attention.projected import projections_and_sdpa
from tokenfusion.kernels import single_query_attention
from tokenfusion.kernels.single_query_attention import reference

CASES = cases.CASES
_EPS = 1e-6
_definition = partial(reference.single_query_attention, normalize=True, eps=_EPS)
_op = partial(single_query_attention, normalize=True, eps=_EPS)


def test_op(case: cases.Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: cases.Case, compiles: tuple[str, ...]) -> Problem:
    weights = _Weights(case)

    def timed(function):
        call = problem.passes(function, case.backward)
        return lambda _, query, tokens, *gradients: call(query, tokens, *gradients[:1])

    backends = problem.backends_for("single_query_attention", *weights.inputs()[1:3], None)
    projected = Variant(problem.PROJECTIONS, weights.projected, comparable=weights.comparable)
    products = 14 if case.backward else 4  # scores and context; again, and the gradients of both
    return Problem(
        "single_query_attention, the op",
        case.sizes(),
        problem.variants(timed, _definition, _op, backends, compiles=compiles, others=[projected]),
        weights.inputs,
        timed(_definition),
        moved=case.moved(shared=0, per_image=2 * case.heads * case.C),
        written=case.backward,
        flops=products * case.B * case.heads * case.N * case.C,
    )


class _Weights:
    """Projections to start from, the op's inputs that they lead to, and the conventional way of using them."""

    def __init__(self, case: cases.Case):
        self.case = case
        shape = (case.C, case.C)
        self.key, self.value = (self._random(*shape).mul_(case.C**-0.5).requires_grad_(case.backward) for _ in range(2))

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=problem.device(), dtype=self.case.torch_dtype)

    def _per_head(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().unflatten(0, (self.case.heads, -1))

    def _absorbed(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W^T rows, head by head: [B, C] -> [B, heads, C]."""
        return torch.einsum("bhd,hdc->bhc", rows.unflatten(-1, (self.case.heads, -1)), self._per_head(weight))

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """(query before absorption, query, tokens), and in training the gradients of (context, output after W_v)."""
        case = self.case
        query, tokens = self._random(case.B, case.C), self._random(case.B, case.N, case.C)
        scale = (case.C // case.heads) ** -0.5
        inputs = [query, self._absorbed(query * scale, self.key).contiguous(), tokens]
        inputs = [tensor.requires_grad_(case.backward) for tensor in inputs]
        if case.backward:
            grad_output = self._random(case.B, case.C)
            inputs += [self._absorbed(grad_output, self.value).contiguous(), grad_output]
        return tuple(inputs)

    def projected(self, query, _, tokens, *gradients):
        def function(query, tokens):
            normalized = F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS)
            return projections_and_sdpa(
                query,
                normalized,
                partial(F.linear, weight=self.key),
                partial(F.linear, weight=self.value),
                heads=self.case.heads,
            )

        if not self.case.backward:
            return problem.forward(function)(query, tokens)
        output, _, grad_tokens, *_ = problem.forward_backward(function, (self.key, self.value))(
            query, tokens, gradients[1]
        )
        return output, grad_tokens

    def comparable(self, results):
        """The op's (context, query's gradient, tokens' gradient) as (W_v context, tokens' gradient)."""
        context, *gradients = results
        value = self._per_head(self.value).to(context.dtype)
        return torch.einsum("bhc,hdc->bhd", context, value).flatten(1), *gradients[1:]
