from tokenfusion.kernels.upconv_concat.op import upconv_concat

__all__ = ["upconv_concat"]
