"""Fused classes for classes of somebody else's, made when one is found."""

import abc
import functools
import inspect
from collections.abc import Hashable
from typing import ClassVar, NamedTuple

from torch import nn

from tokenfusion.layers.drop_in import DropIn


class Agreement(NamedTuple):
    """Where a fused form agrees with a class's own forward, beside in evaluation."""

    in_training: bool
    in_float64: bool  # to its rounding
    in_autocast: bool  # also of the result's dtype
    modes: tuple[str, ...]  # the parts for which it counts whether they are in training


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
        cls = type(self)
        return _new_fused, (cls.found, cls.original, cls.details), *super().__reduce_ex__(protocol)[2:]


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


def why_not_names(module: nn.Module, found: type[Found]) -> str | None:
    """Attributes of the module or its class that those of the fused class would hide, its own way of pickling, or of
    making classes, such as one that keeps a register of names."""
    bases = [base for base in found.__mro__ if issubclass(base, DropIn)]
    names = {name for base in bases for name in (*vars(base), *inspect.get_annotations(base))} - {"forward"}
    taken = sorted(name for name in names.intersection(dir(module)) if not name.startswith("__"))
    if taken:
        return f"it has attributes of the names that its fused class has: {', '.join(taken)}"
    if any(getattr(type(module), name) is not getattr(object, name) for name in ("__reduce__", "__reduce_ex__")):
        return "its class has a way of its own to be pickled"
    if type(type(module)) not in (type, abc.ABCMeta):
        return f"its class is made by {type(type(module)).__name__}"
    return None
