"""What is known of a kernel that a Triton host launched."""

from dataclasses import dataclass

SIZES = {"C", "F", "K", "N", "S", "WIDTH", "REDUCED", "SKIP"}  # constexprs that follow from the call


@dataclass(frozen=True)
class Launch:
    """constants: the kernel's constexprs, num_warps and num_stages; seconds those that each part took."""

    kernel: str
    capability: int
    dtype: str
    constants: dict[str, object]
    grid: tuple[int, ...]
    compiling: float = 0.0
    running: float = 0.0

    @property
    def tile(self) -> dict[str, int]:
        return {name: value for name, value in self.constants.items() if name not in SIZES and not self._is_flag(name)}

    @property
    def flags(self) -> dict[str, object]:
        return {name: value for name, value in self.constants.items() if self._is_flag(name)}

    def _is_flag(self, name: str) -> bool:
        return name.startswith("HAS_") or name == "STRIDE_UNIT" or isinstance(self.constants[name], bool | str)
