"""What a rule of `fuse` is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn


class AnyRule(Protocol):
    """What `fuse` asks of a rule: which modules are its, why to leave one alone, how to replace and restore it."""

    op: str
    absorbs: tuple[str, ...]

    def matches(self, module: nn.Module) -> bool: ...
    def why_not(self, module: nn.Module) -> str | None: ...
    def replace(self, module: nn.Module) -> None: ...
    def restore(self, module: nn.Module) -> None: ...


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

    def matches(self, module: nn.Module) -> bool:
        """By exact class: a subclass may have changed what its forward means."""
        return type(module) in (self.original, self.fused)

    def replace(self, module: nn.Module) -> None:
        module.__class__ = self.fused

    def restore(self, module: nn.Module) -> None:
        module.__class__ = self.original
