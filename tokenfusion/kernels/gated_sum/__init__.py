from tokenfusion.kernels.gated_sum.op import gated_sum

__all__ = ["gated_sum"]
