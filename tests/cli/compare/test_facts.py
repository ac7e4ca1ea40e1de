import math

import torch

from tokenfusion.cli.compare import facts, timing
from tokenfusion.kernels.dispatch import Choice


def test_ratios_say_how_many_times_as_fast():
    timings = {
        timing.EAGER: timing.Timing([2.0, 4.0], 10, 2.0),
        timing.COMPILED: timing.Timing(unavailable="no compiler"),
        timing.FUSED: timing.Timing([1.0, 1.0], 5, 1.0),
    }
    found = facts.of_timings(timings)
    assert math.isclose(found[timing.FUSED]["vs_eager"], 3.0)
    assert found[timing.FUSED]["vs_compile"] is None
    assert found[timing.COMPILED]["median_seconds"] is None


def test_without_a_classifier_there_is_no_top_1():
    outputs, model = torch.randn(2, 5), torch.nn.Identity()
    for model.num_classes, same in ((5, 2), (0, None)):
        assert facts.differences(model, outputs, outputs, outputs)["same_top_1"] == same


def test_choices_are_counted():
    choices = [
        Choice("op", "cpu", {"cpu": None, "reference": None}),
        Choice("op", "reference", {"cpu": "no", "reference": None}),
    ]
    assert facts.dispatched(choices) == {"op": facts.Dispatched({"cpu": 1, "reference": 1}, choices[1].why_not)}
