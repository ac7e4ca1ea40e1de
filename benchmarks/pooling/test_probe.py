"""An attentive probe on frozen tokens: a training step, and inference. Eager returns the weights, as is the default."""

from benchmarks.measure.problem import TRAINING
from benchmarks.ops.single_query_attention.cases import Case
from benchmarks.pooling.probe import probe_problem

_SIZES = ((32, 1024, 768, 12), (32, 256, 1024, 16))
_KINDS = [(dtype, direction) for dtype in ("float32", "bfloat16") for direction in (TRAINING, "forward")]
CASES = {
    "smoke": [Case(8, 196, 192, 3, direction=TRAINING)],
    "quick": [Case(*_SIZES[0], direction=TRAINING)],
    "full": [Case(*sizes, *kind) for kind in _KINDS for sizes in _SIZES],
    "headline": [Case(*_SIZES[0], *_KINDS[2])],
    "gpu": [Case(*_SIZES[0], *kind) for kind in _KINDS[2:]],
}


def test_probe(case: Case, run, compiles):
    what = "a training step without the optimizer" if case.backward else "inference"
    run(probe_problem(f"Attentive probe on frozen tokens, {what}, eager is nn.MultiheadAttention", case, compiles))
