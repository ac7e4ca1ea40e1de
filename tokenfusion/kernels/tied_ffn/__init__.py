from tokenfusion.kernels.tied_ffn.op import tied_ffn

__all__ = ["tied_ffn"]
