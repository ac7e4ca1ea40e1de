"""The rule by which a kernel counts as right, and how a test sees which backend ran."""

import contextlib

import torch


def assert_parity(actual: torch.Tensor, unfused: torch.Tensor, exact: torch.Tensor, name: str = "") -> None:
    """The error of `actual` is at most twice that of the unfused PyTorch path in the same dtype.

    Both against `exact`, computed in float64 from the same rounded inputs, by the largest difference and by the cosine
    distance of the whole tensors. Beyond it, four units in the last place of the largest value are allowed (a thousand
    for float64, for which `exact` is no more exact than the rest), and half their square of cosine distance.
    """
    assert actual.dtype == unfused.dtype, f"{name}: dtype {actual.dtype}, expected {unfused.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    ulp = torch.finfo(actual.dtype).eps
    exact = exact.double()
    tiny = (1000 if actual.dtype == torch.float64 else 4) * ulp * exact.abs().max().item() if exact.numel() else 0.0

    def error(tensor: torch.Tensor) -> float:
        return (tensor.double() - exact).abs().max().item() if tensor.numel() else 0.0

    def cosine_distance(tensor: torch.Tensor) -> float:
        a, b = tensor.double().flatten(), exact.flatten()
        norms = a.norm() * b.norm()
        return (1 - (a @ b) / norms).item() if norms > 0 else 0.0

    assert error(actual) <= 2 * error(unfused) + tiny, (
        f"{name}: error {error(actual):.2e}, unfused {error(unfused):.2e}, allowed on top {tiny:.2e}"
    )
    assert cosine_distance(actual) <= 2 * cosine_distance(unfused) + max(8 * ulp**2, 1e-14), (
        f"{name}: cosine distance {cosine_distance(actual):.2e}, unfused {cosine_distance(unfused):.2e}"
    )


@contextlib.contextmanager
def assert_runs(*operators: str):
    """The with-block runs each of these operators of the namespace tokenfusion, and no other of it."""
    with torch.autograd.profiler.profile() as profile:
        yield
    names = {event.name for event in profile.function_events}
    ran = {name.removeprefix("tokenfusion::") for name in names if name.startswith("tokenfusion::")}
    assert ran == set(operators), f"ran {sorted(ran)}, expected {sorted(operators)}"
