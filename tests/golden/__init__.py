"""Values that other people's code computed; README.md names the sources."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check_golden(file: str, prefix: str, module: nn.Module) -> None:
    """Output and every gradient of a module against those recorded in FILE under PREFIX, in the module's dtype.

    Differences are relative to the largest element of a tensor, or of the largest gradient for those that are zero but
    for rounding.
    """
    with safe_open(Path(__file__).parent / file, "pt") as stored:
        golden = {k.removeprefix(prefix): stored.get_tensor(k) for k in stored.keys() if k.startswith(prefix)}
    parameters = dict(module.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    module.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    x = golden["input"].to(dtype).requires_grad_()
    output = module(x)
    output.backward(golden["cotangent"].to(dtype))
    actual = {"output": output, "grad.input": x.grad} | {f"grad.{name}": p.grad for name, p in parameters.items()}
    expected = {k: v for k, v in golden.items() if k == "output" or k.startswith("grad.")}
    assert actual.keys() == expected.keys()
    largest = max(v.abs().max() for k, v in expected.items() if k.startswith("grad."))
    for name, want in expected.items():
        scale = want.abs().max()
        scale = scale if scale > 1e-10 * largest else largest
        error = ((actual[name].double() - want).abs().max() / scale).item()
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}, allowed {TOLERANCE[dtype]:.1e}"
