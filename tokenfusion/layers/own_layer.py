"""Layers of the package's own, fused while that is valid and in their plain form otherwise."""

from tokenfusion.layers.drop_in import DropIn, remember_forwards


class OwnLayer(DropIn):
    """Base of a fused layer that stands in for no other class; `plain_forward` is an ordinary method.

    The plain form calls the parts that the fused one reads past. TorchScript, tracers and exporters see the plain form.
    """

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if OwnLayer in cls.__bases__:
            cls.original = cls
            remember_forwards(cls)
