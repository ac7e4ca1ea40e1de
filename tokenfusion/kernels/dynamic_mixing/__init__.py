from tokenfusion.kernels.dynamic_mixing.op import dynamic_mixing

__all__ = ["dynamic_mixing"]
