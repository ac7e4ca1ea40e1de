"""One matrix for several, and how far it is from each of them."""

import torch


def chosen(originals: list[torch.Tensor], init: str, fresh: torch.Tensor) -> torch.Tensor:
    """The single matrix for several of equal shape."""
    if init == "fresh":
        return fresh
    return originals[0] if init == "first" else torch.stack(originals).mean(0)


def relative_error(rebuilt: torch.Tensor, original: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the original."""
    return float((rebuilt - original).double().norm() / original.double().norm().clamp_min(1e-30))
