"""What a rule of `fuse` is."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Rule:
    """original -> fused, a subclass of it that changes the forward pass alone, so that parameters stay in place.

    why_not tells why a module of the original class is to be left alone; None when it can be replaced. fused is None
    for a class that never can be. absorbs names the children whose work the fused forward does itself, so that they
    need no replacement of their own.
    """

    op: str
    original: type[nn.Module]
    fused: type[nn.Module] | None
    why_not: Callable[[nn.Module], str | None]
    absorbs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.original.__name__

    def matches(self, module: nn.Module) -> bool:
        """By exact class: a subclass may have changed what its forward means."""
        return type(module) in (self.original, self.fused)

    def replace(self, module: nn.Module) -> None:
        module.__class__ = self.fused

    def restore(self, module: nn.Module) -> None:
        module.__class__ = self.original
