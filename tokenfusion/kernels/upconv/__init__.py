from tokenfusion.kernels.upconv.concat.op import upconv_concat
from tokenfusion.kernels.upconv.project.op import upconv_add, upconv_concat_project

__all__ = ["upconv_add", "upconv_concat", "upconv_concat_project"]
