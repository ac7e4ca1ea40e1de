import torch
from torch import nn

from tokenfusion.cli.compare import timing


def test_innermost_modules_hold_no_other():
    assert timing.innermost(["a", "a.b", "a.c.d", "ab"]) == ["a.b", "a.c.d", "ab"]
    assert timing.innermost(["", "a"]) == ["a"]


def test_recorded_calls_repeat_the_forward_pass():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    calls = timing.recorded_calls(model, ["2", "0"], x)
    assert [name for name, _, _ in calls] == ["0", "2"]
    outputs = timing.Calls(model, calls)([call[1:] for call in calls])
    torch.testing.assert_close(outputs[1], model(x))
    assert not any(module._forward_pre_hooks for module in model.modules())
