from tokenfusion.kernels.upconv_concat_project.op import upconv_add, upconv_concat_project

__all__ = ["upconv_add", "upconv_concat_project"]
