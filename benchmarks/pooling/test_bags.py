"""Pooling of one bag of tokens, as of a slide's patches: from 256 to 100,000 of them."""

from benchmarks.measure.problem import TRAINING
from benchmarks.ops.single_query_attention.cases import Case
from benchmarks.pooling.probe import probe_problem

_LENGTHS = (256, 1000, 5000, 20000, 100000)
CASES = {
    "smoke": [Case(1, 1000, 64, 2)],
    "quick": [Case(1, 20000, 1024, 8, direction=TRAINING)],
    "gpu": [Case(1, 20000, 1024, 8, "bfloat16", TRAINING)],
    "full": [Case(1, n, 1024, 8, direction=way) for way in (TRAINING, "forward") for n in _LENGTHS],
}


def test_bag(case: Case, run, compiles):
    what = "a training step without the optimizer" if case.backward else "inference"
    run(probe_problem(f"Pooling of a bag, {what}, eager is nn.MultiheadAttention", case, compiles))
