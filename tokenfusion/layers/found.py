"""Fused classes for classes of somebody else's, made when one is found."""

import functools
from collections.abc import Hashable
from typing import ClassVar

from torch import nn

from tokenfusion.layers.drop_in import DropIn


class Found(DropIn):
    """Base of what such a class computes when it is fused; `fused_class` puts it before the class itself.

    details is what has to be known of the class besides, if anything.
    """

    found: "ClassVar[type[Found]]"
    details: ClassVar[Hashable]

    def __init_subclass__(cls) -> None:
        """Not passed on: a class that keeps a register of its subclasses is not to learn of the fused one."""

    def __reduce_ex__(self, protocol):
        """By the class that it had, as this one can be imported nowhere."""
        return _new_fused, (self.found, self.original, self.details), *super().__reduce_ex__(protocol)[2:]


@functools.cache
def fused_class(found: type[Found], original: type[nn.Module], details: Hashable) -> type[nn.Module]:
    """A subclass of both, of the original's name; one for each class, so that type(module) compares as usual."""
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "found": found, "details": details}
    fused = type(original.__name__, (found, original), body)
    fused.stand_in_for(original)
    return fused


def _new_fused(found: type[Found], original: type[nn.Module], details: Hashable) -> nn.Module:
    fused = fused_class(found, original, details)
    return fused.__new__(fused)
