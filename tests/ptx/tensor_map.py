"""What a CUtensorMap says, for cp.async.bulk.tensor; the arguments are those of cuTensorMapEncodeTiled.

NVIDIA's 128 bytes are opaque, so these are the interpreter's own, and mean nothing to a GPU.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch

from .errors import Fault

SWIZZLES = {0: 0, 32: 1, 64: 3, 128: 7}  # which 16-byte chunks of a row are exchanged: bits of the row's number
_FORMAT = "<8sQHHHH5Q4Q5I"
_MAGIC = b"tiledmap"


@dataclass(frozen=True)
class TensorMap:
    """Dimensions from the innermost out; strides in bytes, of all but the innermost; `fill` is "zeros" or "nan"."""

    address: int
    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    fill: str = "zeros"

    @classmethod
    def of(cls, tensor: torch.Tensor, box: tuple[int, ...], swizzle: int = 0, fill: str = "zeros") -> "TensorMap":
        """A map of the tensor, whose last dimension is contiguous; `box` goes from the first dimension to the last."""
        element = tensor.element_size()
        sizes, strides = tensor.shape[::-1], [stride * element for stride in tensor.stride()[::-1]]
        assert strides[0] == element
        return cls(tensor.data_ptr(), element, tuple(sizes), tuple(strides[1:]), tuple(box[::-1]), swizzle, fill)

    def __post_init__(self):
        rank = len(self.sizes)
        inner = self.box[0] * self.element
        assert 1 <= rank <= 5 and len(self.strides) == rank - 1 and len(self.box) == rank
        assert self.address % 16 == 0 and all(stride % 16 == 0 for stride in self.strides)
        assert all(1 <= extent <= 256 for extent in self.box) and inner % 16 == 0
        assert not self.swizzle or inner <= self.swizzle, "a row of the box is longer than the swizzle"

    def encode(self) -> bytes:
        pad = lambda values, count: (*values, *(0,) * (count - len(values)))  # noqa: E731
        packed = struct.pack(
            _FORMAT, _MAGIC, self.address, self.element, len(self.sizes), self.swizzle, self.fill == "nan",
            *pad(self.sizes, 5), *pad(self.strides, 4), *pad(self.box, 5),
        )  # fmt: skip
        return packed.ljust(128, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> "TensorMap":
        magic, address, element, rank, swizzle, nan, *rest = struct.unpack(_FORMAT, data[: struct.calcsize(_FORMAT)])
        if magic != _MAGIC:
            raise Fault("no tensor map lies at this address")
        fill = "nan" if nan else "zeros"
        return cls(
            address, element, tuple(rest[:rank]), tuple(rest[5 : 4 + rank]), tuple(rest[9 : 9 + rank]), swizzle, fill
        )

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def elements(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of a box's elements in global memory, innermost first, and which of them lie in the tensor."""
        address, inside = np.array([self.address]), np.array([True])
        strides = (self.element, *self.strides)
        for axis in reversed(range(len(self.sizes))):
            index = int(coordinates[axis]) + np.arange(self.box[axis])
            address = (address[:, None] + index * strides[axis]).reshape(-1)
            inside = (inside[:, None] & (index >= 0) & (index < self.sizes[axis])).reshape(-1)
        return address, inside

    def places(self, start: int) -> np.ndarray:
        """Addresses in shared memory of the box's 16-byte chunks, in the order of its elements."""
        linear = start + np.arange(0, self.bytes, 16)
        return linear ^ (((linear >> 7) & SWIZZLES[self.swizzle]) << 4)
