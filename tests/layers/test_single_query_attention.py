"""SingleQueryAttention against the formula of its docstring."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.crossvit import randomize
from tests.drop_in import BACKWARD, FORWARD, check_parity
from tests.parity import assert_parity, assert_runs
from tokenfusion.layers import SingleQueryAttention
from tokenfusion.layers.attention_weights import additive, as_lengths, beyond


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


class Torchs(nn.Module):
    """nn.MultiheadAttention with the parameters of a layer and the layer's arguments; result 1 is the weights."""

    def __init__(self, layer, result):
        super().__init__()
        self.norm, self.result = layer.norm, result
        self.attn = nn.MultiheadAttention(48, 6, layer.dropout, batch_first=True)
        parts = layer.q, layer.k, layer.v
        self.attn.in_proj_weight = nn.Parameter(torch.cat([part.weight for part in parts]).detach())
        self.attn.in_proj_bias = nn.Parameter(torch.cat([part.bias for part in parts]).detach())
        self.attn.out_proj.load_state_dict(layer.proj.state_dict())

    def forward(self, tokens, query, extra_token=None, mask=None, average_attn_weights=True):
        if extra_token is not None:
            tokens = torch.cat((extra_token.unsqueeze(1), tokens), dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=0)
        n, query = (tokens, query) if self.norm is None else (self.norm(tokens), self.norm(query))
        need = {"need_weights": bool(self.result), "average_attn_weights": average_attn_weights}
        return self.attn(query, n, n, key_padding_mask=mask, **need)[self.result]


class Seeded(nn.Module):
    def __init__(self, module, result=0, **call):
        super().__init__()
        self.module, self.result, self.call = module, result, call

    def forward(self, *tensors):
        torch.manual_seed(3)
        call = dict(self.call)
        if call.get("mask") is not None and call["mask"].is_floating_point():
            call["mask"] = call["mask"].to(tensors[0].dtype)
        if isinstance(self.module, SingleQueryAttention):
            out = self.module(*tensors, need_weights=bool(self.result), **call)
            return out[1] if self.result else out
        return self.module(*tensors, **call)


def padding(tokens=40):
    return torch.rand(3, tokens, generator=torch.Generator().manual_seed(2)) < 0.4


MASKS = {"none": None, "boolean": padding(), "additive": torch.randn(3, 40)}


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm}], ids=str)
@pytest.mark.parametrize("result", ["output", "weights", "weights of each head"])
def test_as_torchs_attention(result, options, mask, dropout, extra):
    """Masks, dropout by the same random numbers, and the weights, with gradients of either result."""
    layer, _ = pair(dropout=dropout, **options)
    index, call = int(result != "output"), dict(mask=MASKS[mask], average_attn_weights=result != "weights of each head")
    tensors = (torch.randn(3, 40, 48), torch.randn(3, 2, 48), *([torch.randn(3, 48)] if extra else []))
    kernels = () if dropout or mask != "none" else (FORWARD, BACKWARD)[: 2 - index]
    _check(Seeded(layer, index, **call), Seeded(Torchs(layer, index), index, **call), tensors, kernels)


def _check(fused, plain, tensors, kernels):
    """As check_parity, whose modules have the same parameters by the same names."""
    exact = _outputs(copy.deepcopy(plain).double(), [x.double() for x in tensors])
    with assert_runs(*kernels):
        actual = _outputs(fused, tensors)
    for got, unfused, expected in zip(actual, _outputs(plain, tensors), exact, strict=True):
        assert_parity(got, unfused, expected)


def _outputs(module, tensors):
    """The output, and the gradients of the inputs and of the projections, as they are in nn.MultiheadAttention."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    module.zero_grad()
    out = module(*tensors)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype))
    inner, norm = module.module, module.module.norm
    parts = (inner.q, inner.k, inner.v, inner.proj) if isinstance(inner, SingleQueryAttention) else None
    if parts is None:
        of_inner = [inner.attn.in_proj_weight.grad, inner.attn.in_proj_bias.grad, inner.attn.out_proj.weight.grad]
    else:
        of_inner = [_joined(parts[:3], "weight"), _joined(parts[:3], "bias"), inner.proj.weight.grad]
    of_norm = [] if norm is None else [norm.weight.grad, norm.bias.grad]
    return [out.detach(), *(x.grad for x in tensors), *(x for x in of_inner + of_norm if x is not None)]


def _joined(parts, name):
    """Zeros where no gradient came, as in a slice of nn.MultiheadAttention's."""
    tensors = [getattr(part, name) for part in parts]
    return torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in tensors])


def last_tokens(*, boolean=True):
    mask = torch.arange(40) >= torch.tensor([40, 7, 0])[:, None]
    return mask if boolean else additive(mask, torch.float32)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm}], ids=str)
def test_a_mask_of_the_last_tokens_runs_the_kernel(options, boolean, extra):
    layer, _ = pair(**options)
    tensors = (torch.randn(3, 40, 48), torch.randn(3, 2, 48), *([torch.randn(3, 48)] if extra else []))
    call = {"mask": last_tokens(boolean=boolean)}
    _check(Seeded(layer, **call), Seeded(Torchs(layer, 0), **call), tensors, (FORWARD, BACKWARD))


@pytest.mark.parametrize("boolean", [False, True])
def test_lengths_of_a_mask(boolean):
    mask = last_tokens(boolean=boolean)
    assert as_lengths(mask).tolist() == [40, 7, 0]
    assert as_lengths(mask[:, :0]).tolist() == [0, 0, 0]
    first, among = mask.flip(1), mask.clone()
    among[0, 3] = among[1, 10]
    assert as_lengths(first) is None and as_lengths(among) is None
    with FakeTensorMode() as mode:
        assert as_lengths(mode.from_tensor(mask)) is None


@pytest.mark.parametrize("value", [-1e9, 0.5, float("nan"), float("inf")])
def test_a_mask_that_adds_something_has_no_lengths(value):
    for image in range(2):
        mask = last_tokens(boolean=False)
        mask[image, 6] = value
        assert as_lengths(mask) is None
    assert as_lengths(last_tokens(boolean=False).requires_grad_()) is None  # it learns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_mask_that_leaves_no_token(training, dtype):
    """Its weights are zeros, and so the output is what the projection makes of zeros."""
    mask = padding()
    mask[1] = True
    layer, _ = pair(dtype, num_latents=1, norm_layer=nn.LayerNorm, dropout=0.2)
    tokens = torch.randn(3, 40, 48).to(dtype).requires_grad_()
    out, weights = layer.train(training)(tokens, mask=mask, need_weights=True)
    assert torch.equal(out[1, 0], layer.proj.bias) and not weights[1].any()
    assert not weights.squeeze(1)[mask].any()
    out.sum().backward()
    assert not tokens.grad[1].any() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_nan_in_the_padding_of_one_image_leaves_the_others():
    layer, _ = pair(num_latents=1)
    mask, tokens = padding(), torch.randn(3, 40, 48)
    broken = tokens.clone()
    broken[1, mask[1]] = float("nan")
    assert torch.equal(layer(broken, mask=mask)[[0, 2]], layer(tokens, mask=mask)[[0, 2]])


@pytest.mark.parametrize("call", [{}, {"mask": padding()}, {"need_weights": True}], ids=["none", "mask", "weights"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_form(call, dropout):
    """The plain form takes and gives the same, and draws the same random numbers."""
    layer, _ = pair(num_latents=2, norm_layer=nn.LayerNorm, dropout=dropout)
    tensors, results = (torch.randn(3, 40, 48), None, torch.randn(3, 48)), []
    for forward in (layer, layer.plain_forward):
        torch.manual_seed(3)
        results.append(forward(*tensors, **call))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_scripted_with_a_mask():
    layer, _ = pair(num_latents=2, dropout=0.3)
    scripted, tokens = torch.jit.script(layer.eval()), torch.randn(3, 40, 48)
    torch.testing.assert_close(scripted(tokens, mask=padding()), layer(tokens, mask=padding()), rtol=1e-4, atol=1e-5)


def test_dropout_at_evaluation_runs_the_kernel():
    layer, formula = pair(num_latents=2, dropout=0.3)
    check_parity(layer.eval(), formula, torch.randn(3, 40, 48))


def test_an_empty_batch():
    layer, _ = pair(num_latents=2)
    assert layer(torch.randn(0, 5, 48)).shape == (0, 2, 48)
    assert layer(torch.randn(0, 5, 48), mask=torch.ones(0, 5).bool()).shape == (0, 2, 48)


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    layer, formula = pair(num_latents=2, norm_layer=nn.LayerNorm)
    x, mask = torch.randn(3, 40, 48), last_tokens()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with assert_runs("single_query_attention_cpu"):
            out = compiled(x)
        torch.testing.assert_close(out, formula(x))
        torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))


@pytest.mark.parametrize(
    "call, error, parts",
    [
        (lambda: SingleQueryAttention(48, 5), ValueError, ["num_heads", "5", "48"]),
        (lambda: SingleQueryAttention(48, dropout=1.0), ValueError, ["dropout", "1.0", "[0, 1)"]),
        (lambda: SingleQueryAttention(48, dropout=-0.1), ValueError, ["dropout", "-0.1"]),
        (
            lambda: SingleQueryAttention(48, num_latents=1)(torch.randn(2, 5, 48), mask=torch.ones(2, 6).bool()),
            ValueError,
            ["mask", "[2, 6]", "[2, 5]"],
        ),
        (
            lambda: SingleQueryAttention(48, num_latents=1)(
                torch.randn(2, 5, 48), mask=torch.ones(2, 5, device="meta")
            ),
            ValueError,
            ["mask", "meta", "cpu"],
        ),
        (
            lambda: SingleQueryAttention(48, num_latents=1)(torch.randn(2, 5, 48), mask=torch.ones(2, 5).int()),
            TypeError,
            ["mask", "int32"],
        ),
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


def _bags(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randn(4, 30, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    lengths = torch.tensor([30, 7, 0, 19])
    tokens[torch.arange(30) >= lengths[:, None]] = torch.nan
    return tokens, lengths


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm}], ids=str)
@pytest.mark.parametrize("form", ["kernel", "weights", "plain"])
def test_lengths_leave_out_what_is_beyond(form, options, extra):
    """Each bag by itself, and an empty one as a mask that leaves no token; what is beyond may be anything."""
    torch.manual_seed(0)
    layer = randomize(SingleQueryAttention(48, 6, num_latents=2, **options)).double()
    tokens, lengths = _bags(torch.float64)
    extras = torch.randn(4, 48, dtype=torch.float64) if extra else None
    tokens.requires_grad_()
    if form == "plain":
        out = layer.plain_forward(tokens, None, extras, lengths=lengths)
    else:
        out = layer(tokens, None, extras, lengths=lengths, need_weights=form == "weights")
        out = out[0] if form == "weights" else out
    out.square().sum().backward()
    for i, length in enumerate(lengths.tolist()):
        one, of_extra = tokens[i : i + 1, : max(length, 1)].detach(), None if extras is None else extras[i : i + 1]
        mask = torch.zeros(one.shape[:2], dtype=torch.bool) if length else torch.ones(1, 1, dtype=torch.bool)
        expected = layer.plain_forward(one if length else torch.zeros_like(one), None, of_extra, mask)
        torch.testing.assert_close(out[i : i + 1], expected)
        assert tokens.grad[i, length:].eq(0).all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_lengths_run_the_kernel_and_join_a_mask():
    layer = SingleQueryAttention(48, 6, num_latents=1)
    tokens, lengths = _bags()
    mask = torch.zeros(4, 30, dtype=torch.bool)
    with torch.no_grad():
        with assert_runs(FORWARD):
            expected = layer(tokens, lengths=lengths)
        for given in (mask, mask.float(), beyond(lengths, tokens), mask | (tokens[..., 0] > 9)):
            torch.testing.assert_close(layer(tokens, mask=given, lengths=lengths), expected)
    with pytest.raises(ValueError, match="lengths: got 31, expected 0 to N = 30"):
        layer(tokens, lengths=lengths + 1)
    with pytest.raises(TypeError, match="lengths: got dtype torch.float32"):
        layer(tokens, lengths=lengths.float())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("form", ["kernel", "weights", "mask", "dropout", "plain"])
def test_packed_bags_are_as_padded_ones(form, gaps, extra):
    layer = randomize(SingleQueryAttention(48, 6, num_latents=2, norm_layer=nn.LayerNorm, dropout=0.3))
    layer.train(form == "dropout")
    if form == "plain":
        layer.k.register_forward_hook(lambda *_: None)
    padded, lengths = _bags()
    extras = torch.randn(4, 48) if extra else None
    mask = torch.rand(4, 30) < 0.3 if form == "mask" else None
    starts, results = torch.zeros(4, dtype=torch.int64), []
    for packed in (True, False):
        tokens = padded.clone().requires_grad_()
        given = tokens
        if packed:
            bags = torch.nested.narrow(tokens, 1, starts, lengths, layout=torch.jagged)
            given = bags if gaps else torch.nested.as_nested_tensor([*bags.unbind()], layout=torch.jagged)
        torch.manual_seed(0)
        options = dict(mask=mask, need_weights=form == "weights", lengths=None if packed else lengths)
        with assert_runs(*[FORWARD] * (form == "kernel")):
            out = layer(given, None, extras, **options)
        out = torch.cat([each.flatten() for each in out]) if form == "weights" else out
        results.append([out, *torch.autograd.grad(out.sum(), (tokens, *layer.parameters()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_scale_of_each_head():
    layer, tokens = randomize(SingleQueryAttention(48, 6, num_latents=1)), torch.randn(6, 9, 48)
    layer.scale = torch.linspace(0.1, 1.0, 6)[:, None, None]
    with assert_runs():
        assert torch.equal(layer(tokens), layer.plain_forward(tokens))
