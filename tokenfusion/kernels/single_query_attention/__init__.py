from tokenfusion.kernels.single_query_attention.op import single_query_attention

__all__ = ["single_query_attention"]
