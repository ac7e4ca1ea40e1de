"""What single_query_attention accepts and refuses, whatever the backend."""

import pytest
import torch

import tokenfusion
from tests.parity import assert_runs
from tokenfusion.kernels import single_query_attention

B, Q, N, C = 2, 3, 5, 16


def arguments(**changed):
    made = dict(query=torch.randn(B, Q, C), tokens=torch.randn(B, N, C), extra_token=torch.randn(B, C))
    return made | changed


@pytest.mark.parametrize(
    "changed, error, parts",
    [
        (dict(query=torch.randn(B, C)), ValueError, ["query", "[2, 16]", "[B, Q, C]"]),
        (dict(tokens=torch.randn(N, C)), ValueError, ["tokens", "[5, 16]", "[B, N, C]"]),
        (dict(extra_token=torch.randn(B, 1, C)), ValueError, ["extra_token", "[2, 1, 16]", "[B, C]"]),
        (dict(query=torch.randn(B, Q, C + 8)), ValueError, ["query", "[2, 3, 24]", "[2, Q, 16]"]),
        (dict(query=torch.randn(B + 1, Q, C)), ValueError, ["query", "[3, 3, 16]", "[2, Q, 16]"]),
        (dict(extra_token=torch.randn(B + 1, C)), ValueError, ["extra_token", "[3, 16]", "[2, 16]"]),
        (dict(tokens=torch.randn(B, 0, C)), ValueError, ["tokens", "[2, 0, 16]", "N >= 1"]),
        (dict(tokens=torch.ones(B, N, C, dtype=torch.int64)), TypeError, ["tokens", "torch.int64", "float32"]),
        (dict(query=torch.ones(B, Q, C, dtype=torch.complex64)), TypeError, ["query", "complex64", "float32"]),
        (dict(query=torch.randn(B, Q, C).double()), TypeError, ["query", "float64", "float32", "tokens"]),
        (dict(extra_token=torch.randn(B, C).half()), TypeError, ["extra_token", "float16", "float32"]),
        (dict(tokens=torch.randn(B, N, C, device="meta")), ValueError, ["query", "cpu", "meta"]),
        (dict(query=[1.0, 2.0]), TypeError, ["query", "list", "torch.Tensor"]),
        (dict(lengths=[1, 2]), TypeError, ["lengths", "list", "torch.Tensor"]),
        (dict(lengths=torch.ones(B)), TypeError, ["lengths: got dtype torch.float32", "expected int32 or int64"]),
        (dict(lengths=torch.ones(B, dtype=torch.bool)), TypeError, ["lengths: got dtype torch.bool", "int64"]),
        (dict(lengths=torch.ones(B, 1, dtype=torch.int64)), ValueError, ["lengths: got shape [2, 1]", "[B]"]),
        (dict(lengths=torch.ones(3, dtype=torch.int64)), ValueError, ["lengths: got shape [3]", "[2]", "[2, 5, 16]"]),
        (dict(lengths=torch.ones(B, dtype=torch.int64, device="meta")), ValueError, ["lengths: got a", "meta", "cpu"]),
        (dict(lengths=torch.tensor([1, -1])), ValueError, ["lengths: got -1", "expected 0 to N = 5"]),
        (dict(lengths=torch.tensor([6, 1])), ValueError, ["lengths: got 6", "expected 0 to N = 5"]),
        (dict(tokens=None), TypeError, ["tokens", "NoneType", "torch.Tensor"]),
    ],
)
def test_bad_input_names_the_argument(changed, error, parts):
    with pytest.raises(error) as caught:
        single_query_attention(**arguments(**changed))
    for part in parts:
        assert part in str(caught.value)


def test_no_backend_by_name_where_it_cannot_run():
    cases = {
        "C = 12": dict(query=torch.randn(B, Q, 12), tokens=torch.randn(B, N, 12)),
        "C = 4104": dict(query=torch.randn(B, Q, 4104), tokens=torch.randn(B, N, 4104)),
        "innermost": dict(query=torch.randn(B, Q, C), tokens=torch.randn(B, C, N).transpose(1, 2)),
    }
    for part, call in cases.items():
        with tokenfusion.backend("cpu"), pytest.raises(RuntimeError, match=part):
            single_query_attention(**call)
        with assert_runs():  # "auto" takes the reference
            single_query_attention(**call)


def test_a_backend_without_a_device_says_so():
    with tokenfusion.backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
        single_query_attention(**arguments())


def test_meta_tensors_give_shapes():
    context = single_query_attention(torch.empty(B, Q, C, device="meta"), torch.empty(B, N, C, device="meta"))
    assert context.shape == (B, Q, C)


def test_export_takes_the_reference():
    class Module(torch.nn.Module):
        def forward(self, query, tokens):
            return single_query_attention(query, tokens, normalize=True)

    inputs = torch.randn(B, Q, C), torch.randn(B, N, C)
    program = torch.export.export(Module(), inputs)
    assert not any("tokenfusion" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))
