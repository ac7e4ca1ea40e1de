"""What the results of the up-convolutions look like, for fakes and for every backend's host."""

import torch


def is_channels_last(tensor: torch.Tensor) -> bool | None:
    """None where both memory formats describe the tensor."""
    if tensor.is_contiguous():
        return None if tensor.is_contiguous(memory_format=torch.channels_last) else False
    return tensor.stride(1) == 1


def gives_channels_last(*tensors: torch.Tensor | None) -> bool:
    """Is the result of these channels_last: where all of them are, but those that are both that and contiguous."""
    known = {is_channels_last(tensor) for tensor in tensors if tensor is not None} - {None}
    return known == {True}


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_map(x: torch.Tensor, weight: torch.Tensor, channels: int, channels_last: bool) -> torch.Tensor:
    """Uninitialised [B, channels, k * h, k * w]."""
    batch, _, height, width = x.shape
    scale = weight.shape[2]
    return torch.empty(
        (batch, channels, scale * height, scale * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(channels_last),
    )


def empty_gradient(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    """An uninitialised gradient of a map in its memory format; of size 0 where none is wanted."""
    if not wanted:
        return tensor.new_empty(0)
    return torch.empty_like(tensor, memory_format=memory_format(is_channels_last(tensor) is True))


def empty_sum(like: torch.Tensor, shape, wanted: bool) -> torch.Tensor:
    """An uninitialised gradient of parameters; of size 0 where none is wanted."""
    return like.new_empty(shape if wanted else 0)
