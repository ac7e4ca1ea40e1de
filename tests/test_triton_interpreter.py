"""TRITON_INTERPRET=1 outside of the tests: the kernels run on a CPU, as the README says."""

import pytest

pytest.importorskip("triton")


def test_kernels_run_where_nothing_but_the_variable_is_set(run_python):
    run_python(
        """
        import torch, tokenfusion

        def results(backend):
            torch.manual_seed(0)
            tensors = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 16), (2, 40, 16))]
            with tokenfusion.backend(backend):
                y = tokenfusion.kernels.single_query_attention(*tensors)
            return y, *torch.autograd.grad(y.square().sum(), tensors)

        for actual, expected in zip(results("triton"), results("reference")):
            torch.testing.assert_close(actual, expected)
        """,
        TRITON_INTERPRET="1",
    )
