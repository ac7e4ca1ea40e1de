"""What a launch tells those who watch it."""

import numpy as np

from .parse import Instruction


class Observer:
    """Told of every instruction and every access; this one does nothing."""

    def issued(self, instruction: Instruction, warps: np.ndarray) -> None:
        """These warps (block * warps a block + warp) issue the instruction, be their threads predicated off or not."""

    def accessed(
        self, instruction: Instruction, space: str, addresses: np.ndarray, width: int, threads: np.ndarray
    ) -> None:
        """These threads (block * threads a block + thread) access `width` bytes each of "global" or "shared" memory."""
