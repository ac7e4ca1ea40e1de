"""TRITON_INTERPRET=1 outside of the tests: the kernels run on a CPU, as the README says."""

import pytest

pytest.importorskip("triton")


def test_kernels_run_where_nothing_but_the_variable_is_set(run_python):
    run_python(
        """
        import torch, tokenfusion
        from tests.parity import assert_parity, assert_runs

        def results(backend, dtype=torch.float32):
            torch.manual_seed(0)
            shapes = ((4, 3, 16), 0.25), ((4, 40, 16), 1)  # for scores of about unit size
            tensors = [(scale * torch.randn(*shape)).to(dtype).requires_grad_() for shape, scale in shapes]
            with tokenfusion.backend(backend):
                y = tokenfusion.kernels.single_query_attention(*tensors)
                return y, *torch.autograd.grad(y.square().sum(), tensors)

        with assert_runs("single_query_attention_triton", "single_query_attention_backward_triton"):
            actual = results("triton")
        for tensors in zip(actual, results("reference"), results("reference", torch.float64), strict=True):
            assert_parity(*tensors)
        """,
        TRITON_INTERPRET="1",
    )
