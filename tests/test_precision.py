"""In what precision float32 numbers are multiplied where eager is the measure of an error."""

import pytest
import torch

from benchmarks.measure import environment
from tokenfusion import precision
from tokenfusion.kernels.choices import Workload
from tokenfusion.kernels.dispatch import OPERATORS, Implementation
from tokenfusion.tuning import proof

CONVOLUTION = torch.backends.cudnn.conv


@pytest.fixture(autouse=True)
def as_before():
    """Settings are those of PyTorch at first, and of the tests at the end."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    yield
    precision.use_ieee()


def test_tests_use_ieee_float32(run_python):
    program = "import tests.conftest; from tokenfusion import precision; print(precision.in_force('cuda'))"
    assert run_python(program).strip() == "IEEE float32"


def test_what_is_in_force_is_told_apart():
    assert precision.in_force("cuda") == "matrix products IEEE float32, convolutions TF32, recurrent layers TF32"
    assert precision.in_force("cpu") == "IEEE float32"
    torch.set_float32_matmul_precision("medium")
    assert precision.in_force("cuda") == "TF32"
    assert precision.in_force("cpu").startswith("matrix products bfloat16, convolutions IEEE float32")
    precision.use_ieee()
    assert precision.in_force("cuda") == precision.in_force("cpu") == "IEEE float32"
    assert not torch.backends.cudnn.allow_tf32


def test_a_record_says_what_was_in_force():
    assert environment.collect("smoke")["float32_products"] == precision.in_force(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    torch.set_float32_matmul_precision("medium")
    assert environment.collect("smoke")["float32_products"] != "IEEE float32"


@pytest.mark.parametrize("matrices", ["highest", "high", "medium"])
def test_settings_are_as_before_afterwards(matrices):
    torch.set_float32_matmul_precision(matrices)
    before = [precision.in_force(device) for device in ("cuda", "cpu")]
    with pytest.raises(KeyError), precision.ieee():
        assert [precision.in_force(device) for device in ("cuda", "cpu")] == ["IEEE float32"] * 2
        raise KeyError
    assert [precision.in_force(device) for device in ("cuda", "cpu")] == before
    assert torch.get_float32_matmul_precision() == matrices and torch.backends.cudnn.allow_tf32


def _in_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """As TF32 rounds, where convolutions may use it."""
    if tensor.dtype != torch.float32 or CONVOLUTION.fp32_precision != "tf32":
        return tensor
    return tensor + (tensor.detach().half().float() - tensor.detach())


def test_the_error_of_tf32_is_not_what_a_kernel_is_allowed(monkeypatch):
    workload = Workload("upconv_concat", ("float32", "inference", "k 2", "contiguous"), (2, 8, 4, 16))
    operator = OPERATORS["upconv_concat"]
    *_, cpu, reference = operator.implementations

    def coarse(*arguments):
        return _in_tf32(reference.run(*arguments))

    def wrong(*arguments):
        return reference.run(*arguments) * (1 + 1e-4)

    in_tf32 = Implementation("reference", coarse, reference.can_run)
    call = proof.call_of(operator, workload, "cpu")
    assert (coarse(*call.operands) - reference.run(*call.operands)).abs().max() > 1e-5, "TF32 is not in force"
    assert proof.why_wrong(call, reference, in_tf32) is None
    assert "relative error" in (proof.why_wrong(call, Implementation("triton", wrong, cpu.can_run), in_tf32) or "")
    assert CONVOLUTION.fp32_precision == "tf32"
