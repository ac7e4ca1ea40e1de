"""SingleQueryAttention against the formula of its docstring."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.crossvit import randomize
from tests.drop_in import check_parity
from tests.parity import assert_runs
from tokenfusion.layers import SingleQueryAttention


class Formula(SingleQueryAttention):
    def forward(self, tokens, query=None, extra_token=None):
        x = tokens if extra_token is None else torch.cat((extra_token.unsqueeze(1), tokens), 1)
        query = self.latent if query is None else query if self.norm is None else self.norm(query)
        x = x if self.norm is None else self.norm(x)
        query = query.expand(len(x), -1, -1)
        q, k, v = (
            f(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for f, t in zip((self.q, self.k, self.v), (query, x, x))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def pair(dtype=torch.float32, **options):
    modules = []
    for kind in (SingleQueryAttention, Formula):
        torch.manual_seed(0)
        modules.append(randomize(kind(48, 6, **options)).to(dtype))
    return modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latents", [1, 3])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_learned_queries(latents, norm, dtype):
    check_parity(*pair(dtype, num_latents=latents, norm_layer=norm), torch.randn(3, 40, 48).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [(3, 1), (3, 4), (1, 2)])
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm}, {"qkv_bias": False}], ids=str)
def test_given_queries(queries, options, dtype):
    x = torch.randn(3, 41, 48).to(dtype)
    check_parity(*pair(dtype, **options), x[:, 1:], torch.randn(*queries, 48).to(dtype), x[:, 0])


def test_more_queries_than_a_kernel_takes():
    check_parity(*pair(num_latents=23), torch.randn(2, 30, 48))


def test_an_empty_batch():
    layer, _ = pair(num_latents=2)
    assert layer(torch.randn(0, 5, 48)).shape == (0, 2, 48)


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    layer, formula = pair(num_latents=2, norm_layer=nn.LayerNorm)
    x = torch.randn(2, 30, 48)
    with torch.no_grad(), assert_runs("single_query_attention_cpu"):
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, formula(x))


@pytest.mark.parametrize(
    "call, error, parts",
    [
        (lambda: SingleQueryAttention(48, 5), ValueError, ["num_heads", "5", "48"]),
        (lambda: SingleQueryAttention(48, norm_layer=nn.Identity), TypeError, ["norm_layer", "Identity"]),
        (lambda: SingleQueryAttention(48)(torch.randn(2, 5, 48)), ValueError, ["query", "None", "[B, L, dim]"]),
        (
            lambda: SingleQueryAttention(48, num_latents=1)(torch.randn(2, 5, 48), torch.randn(2, 1, 48)),
            ValueError,
            ["query", "a tensor", "learned"],
        ),
        (
            lambda: SingleQueryAttention(48)(torch.randn(2, 5, 48), torch.randn(2, 48)),
            ValueError,
            ["query", "[2, 48]", "[B, L, dim]"],
        ),
    ],
)
def test_bad_input(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts)
