"""nn.MultiheadAttention fused against its own forward: results, weights, gradients and random numbers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tokenfusion
from tests.crossvit import fused_copy, randomize
from tests.drop_in import BACKWARD, FORWARD, check_drop_in, check_parity, outputs_and_gradients
from tests.parity import assert_parity, assert_runs
from tokenfusion.layers.attention_weights import additive, as_lengths
from tokenfusion.layers.multihead_attention import MultiheadAttention

B, L, N, C, HEADS = 3, 2, 20, 48, 6


class Pool(nn.Module):
    """Attention of one tensor over another: the output, or the weights, whose gradients are checked, too."""

    def __init__(self, options: dict, call: dict, result: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.attn = randomize(nn.MultiheadAttention(C, HEADS, **options))
        self.call, self.result = call, result

    def forward(self, query, tokens):
        torch.manual_seed(3)
        call = {name: to_dtype(value, query.dtype) for name, value in self.call.items()}
        return self.attn(query, tokens, tokens, **call)[self.result]


def to_dtype(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def inputs(batch_first=False, batched=True, dtype=torch.float32, kdim=C):
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, L, C), (B, N, kdim)] if batched else [(L, C), (N, kdim)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return tensors if batch_first or not batched else [x.transpose(0, 1).contiguous() for x in tensors]


def drawn(*shape, share=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < share


def float_mask(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


LAST = torch.arange(N) >= torch.tensor([[13], [N], [1]])
MASKS = {
    "none": {},
    "last tokens": {"key_padding_mask": LAST},
    "float last tokens": {"key_padding_mask": additive(LAST, torch.float32)},
    "padding": {"key_padding_mask": drawn(B, N)},
    "float padding": {"key_padding_mask": float_mask(B, N)},
    "rows": {"attn_mask": drawn(L, N)},
    "rows of every head": {"attn_mask": float_mask(B * HEADS, L, N)},
    "both": {"key_padding_mask": drawn(B, N), "attn_mask": drawn(B * HEADS, L, N)},
}


def kernels(call, options):
    """What runs: without weights, a mask of the last tokens is their number."""
    mask, need_weights = call.get("key_padding_mask"), call.get("need_weights", True)
    by_kernel = mask is None or (not need_weights and as_lengths(torch.atleast_2d(mask)) is not None)
    return (FORWARD, BACKWARD) if by_kernel and "attn_mask" not in call and not options.get("dropout") else ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_outputs(mask, need_weights, dropout, dtype):
    options, call = {"dropout": dropout}, MASKS[mask] | {"need_weights": need_weights}
    plain = Pool(options, call).to(dtype)
    check_parity(fused_copy(plain), plain, *inputs(dtype=dtype), runs=kernels(call, options))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_weights(mask, dropout, average):
    options, call = {"dropout": dropout}, MASKS[mask] | {"average_attn_weights": average}
    plain = Pool(options, call, result=1)
    check_parity(fused_copy(plain), plain, *inputs(), runs=kernels(call, options)[:1])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"batch_first": True, "dropout": 0.3},
        {"kdim": 32, "vdim": 32},
        {"kdim": 64, "vdim": 64, "bias": False},
    ],
    ids=str,
)
def test_constructions(options, need_weights):
    plain = Pool(options, {"need_weights": need_weights})
    tensors = inputs(options.get("batch_first", False), kdim=options.get("kdim", C))
    if options.get("dropout"):
        check_parity(fused_copy(plain), plain, *tensors, runs=())
    else:
        check_drop_in(plain, *tensors)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"key_padding_mask": drawn(N)},
        {"key_padding_mask": LAST[0], "need_weights": False},
        {"attn_mask": float_mask(HEADS, L, N), "average_attn_weights": False},
    ],
    ids=["none", "padding", "last tokens", "rows of every head"],
)
@pytest.mark.parametrize("result", [0, 1])
def test_unbatched(call, result):
    if result and not call.get("need_weights", True):
        return
    plain = Pool({}, call, result)
    check_parity(fused_copy(plain), plain, *inputs(batched=False), runs=kernels(call, {})[: 2 - result])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_no_token_left(last, need_weights, training):
    """Weights of NaN where they are asked for, and zeros otherwise, as torch has it."""
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1], padding[0, 0] = True, not last
    plain = Pool({"dropout": 0.3}, {"key_padding_mask": padding, "need_weights": need_weights}).train(training)
    expected = outputs_and_gradients(plain, *inputs())
    with assert_runs(*((FORWARD, BACKWARD) if last and not need_weights and not training else ())):
        got = outputs_and_gradients(fused_copy(plain), *inputs())
    assert expected["out"][:, 1].isnan().all() == need_weights
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_one_query_expanded_for_all_images():
    """Each of its rows has a gradient of its own."""
    plain, (_, tokens) = Pool({"batch_first": True}, {}), inputs(batch_first=True)
    check_parity(fused_copy(plain), plain, torch.randn(1, 1, C).expand(B, -1, -1), tokens)


def test_the_gradient_of_the_keys_bias_is_zero():
    fused = fused_copy(Pool({}, {}))
    gradient = outputs_and_gradients(fused, *inputs())["attn.in_proj_bias"]
    assert not gradient[C : 2 * C].any() and gradient[:C].any() and gradient[2 * C :].any()


@pytest.mark.parametrize(
    "call",
    [{}, {"need_weights": False}, MASKS["padding"], MASKS["last tokens"] | {"need_weights": False}],
    ids=["weights", "none", "padding", "last tokens"],
)
@pytest.mark.parametrize("result", [0, 1])
def test_autocast(call, result):
    if result and not call.get("need_weights", True):
        return
    plain = Pool({}, call, result).eval()
    fused = fused_copy(plain)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(*(x.double() for x in inputs()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_parity(fused(*inputs()), plain(*inputs()), exact)


def test_strides_of_the_output():
    """torch's, for whoever calls view or drops some of it: random numbers are drawn in the order of memory."""
    for batch_first in (False, True):
        plain = Pool({"batch_first": batch_first}, {})
        fused, tensors = fused_copy(plain), inputs(batch_first)
        assert fused(*tensors).stride() == plain(*tensors).stride()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "call, dynamic_with_dropout",
    [({}, False), (MASKS["both"], True), ({"need_weights": False}, True)],
    ids=["weights", "masks", "none"],
)
def test_compiles_without_graph_breaks(call, dropout, dynamic_with_dropout):
    """Every two of mask, dropout and sizes: each call with sizes known and with any, half of them with dropout."""
    dynamic = bool(dropout) == dynamic_with_dropout
    torch.compiler.reset()
    plain = Pool({"dropout": dropout}, call).attn
    query, tokens = inputs()
    outs = []
    compiled = torch.compile(fused_copy(plain), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for model in (plain, compiled):
        torch.manual_seed(3)
        outs.append(model(query, tokens, tokens, **call)[0])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


SELF = {
    "self-attention": lambda attn, q, x: attn(x, x, x),
    "values apart": lambda attn, q, x: attn(q, x, x.clone()),
    "many queries": lambda attn, q, x: attn(torch.cat((q, q)), x, x),
    "causal": lambda attn, q, x: attn(q, x, x, is_causal=True, attn_mask=drawn(L, N)),
    "no tokens": lambda attn, q, x: attn(q, *[x[:0]] * 2),
    "nobody": lambda attn, q, x: attn(q[:, :0], *[x[:, :0]] * 2),
}


@pytest.mark.parametrize("call", SELF.values(), ids=SELF)
def test_calls_that_run_torchs_forward(call, caplog):
    plain = Pool({}, {}).attn
    query, tokens = inputs()
    with assert_runs():
        out, weights = call(fused_copy(plain), query, tokens)
    expected, expected_weights = call(plain, query, tokens)
    assert torch.equal(out, expected) and torch.equal(weights, expected_weights)
    assert not caplog.records


BAD = {
    "another batch": lambda attn, q, x: attn(q[:, :1], x, x),
    "other channels": lambda attn, q, x: attn(q, *[x[..., :8]] * 2),
    "another dtype": lambda attn, q, x: attn(q.double(), x, x),
    "mask of another shape": lambda attn, q, x: attn(q, x, x, key_padding_mask=drawn(B, N + 1)),
    "rows of another shape": lambda attn, q, x: attn(q, x, x, attn_mask=drawn(L + 1, N)),
    "mask of integers": lambda attn, q, x: attn(q, x, x, key_padding_mask=torch.zeros(B, N, dtype=torch.uint8)),
    "mask elsewhere": lambda attn, q, x: attn.to("meta")(
        q.to("meta"), *[x.to("meta")] * 2, key_padding_mask=LAST, need_weights=False
    ),
    "causal without a mask": lambda attn, q, x: attn(q, x, x, is_causal=True),
    "rank": lambda attn, q, x: attn(q[0], x, x),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_torchs_own_errors(call):
    plain, errors = Pool({}, {}).attn, []
    for attn in (plain, fused_copy(plain)):
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            call(attn, *inputs())
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_torchs_own_warning():
    attn = fused_copy(Pool({}, {}).attn)
    query, tokens = inputs()
    with pytest.warns(UserWarning, match="mismatched"):
        attn(query, tokens, tokens, key_padding_mask=drawn(B, N), attn_mask=float_mask(L, N))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"add_bias_kv": True}, "it has bias_k and bias_v"),
        ({"add_zero_attn": True}, "add_zero_attn is set"),
        ({"kdim": 8, "vdim": 16}, "kdim: 8 and vdim: 16, of keys and values that are two tensors"),
        ({"kdim": 8, "vdim": 8}, "6 heads of 8 channels"),
        ({"num_heads": 24}, "24 heads of 48 channels"),
    ],
)
def test_what_is_left_alone(options, reason):
    model = nn.Sequential(nn.MultiheadAttention(C, **{"num_heads": HEADS} | options))
    report = tokenfusion.fuse(model)
    assert reason in report.left[0].reason and type(model[0]) is nn.MultiheadAttention


@pytest.mark.parametrize(
    "name, value", [("dropout", 0.4), ("num_heads", 3), ("add_zero_attn", True), ("training", False)]
)
def test_attributes_changed_after_fusing(name, value):
    plain = Pool({"dropout": 0.3}, {})
    fused = fused_copy(plain)
    for model in (plain, fused):
        setattr(model.attn, name, value)
    torch.testing.assert_close(fused(*inputs()), plain(*inputs()), rtol=1e-4, atol=1e-5)


def test_a_bias_of_the_keys_added_after_fusing(caplog):
    plain = Pool({}, {})
    fused = fused_copy(plain)
    for model in (plain, fused):
        model.attn.bias_k = model.attn.bias_v = nn.Parameter(torch.ones(1, 1, C))
    with assert_runs():
        assert torch.equal(fused(*inputs()), plain(*inputs()))
    assert "bias_k" in caplog.text


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("queries", [1, 2])
def test_transformers_of_torch(queries, batch_first, training):
    """Their encoders read the attention's attributes; a decoder's few queries over the memory are fused."""
    torch.manual_seed(0)
    options = dict(dim_feedforward=32, dropout=0.2, batch_first=batch_first)
    with warnings.catch_warnings(action="ignore"):  # of nested tensors, which some settings rule out
        plain = nn.Transformer(C, HEADS, 2, 2, **options).train(training)
    fused, results = fused_copy(plain), []
    source, target = torch.randn(2, 9, B, C) if not batch_first else torch.randn(2, B, 9, C)
    target = target[:, :queries] if batch_first else target[:queries]
    padding = torch.zeros(B, 9, dtype=torch.bool)
    padding[0, 6:] = True
    for model in (plain, fused):
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            results.append(model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding[:, :9]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_an_encoder_gives_the_same_bits():
    with warnings.catch_warnings(action="ignore"):
        layer = nn.TransformerEncoderLayer(C, HEADS, 32, batch_first=True)
        plain = nn.TransformerEncoder(layer, 2).eval()
    fused, x = fused_copy(plain), torch.randn(B, N, C)
    padding = drawn(B, N).sort(dim=1).values
    with torch.no_grad(), assert_runs():
        assert torch.equal(fused(x), plain(x))
        torch.testing.assert_close(fused(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding))
    assert torch.equal(fused(x), plain(x))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(C, HEADS)

    def forward(self, query, tokens):
        return self.attn(query, tokens, tokens)[0]


class OfOnes(Embedded):
    def forward(self, tokens):
        return self.attn(torch.ones(1, B, C), tokens, tokens)[0]


def test_traced_with_a_constant_query():
    model, (_, tokens) = fused_copy(OfOnes().eval()), inputs()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(tokens), model(tokens))


def test_scripted_and_traced():
    plain, (query, tokens) = Embedded().eval(), inputs()
    fused = fused_copy(plain)
    expected = plain(query, tokens)
    graph = torch.fx.symbolic_trace(fused)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["attn"]
    with warnings.catch_warnings(action="ignore"):
        others = torch.jit.script(fused), torch.jit.trace(fused, (query, tokens))
    exported = torch.export.export(fused, (query, tokens)).module()
    for other in (graph, *others, exported):
        torch.testing.assert_close(other(query, tokens), expected, rtol=1e-4, atol=1e-5)


class Probe(nn.Module):
    """One learned query and a classifier, with dropout where rate > 0."""

    def __init__(self, rate: float):
        super().__init__()
        self.query = nn.Parameter(0.1 * torch.randn(1, 1, C))
        self.attn, self.head = nn.MultiheadAttention(C, HEADS, dropout=rate, batch_first=True), nn.Linear(C, 4)

    def forward(self, x):
        return self.head(self.attn(self.query.expand(len(x), -1, -1), x, x)[0][:, 0])

    def in_another_order(self, channels):
        """The same probe of tokens whose channels come in this order: its sums have another one, and other rounding."""
        probe = copy.deepcopy(self)
        with torch.no_grad():
            probe.attn.in_proj_weight[C:] = probe.attn.in_proj_weight[C:, channels]
        return probe


def losses_of(probe, tokens, classes):
    """Of fifty steps on frozen tokens."""
    optimizer, losses = torch.optim.AdamW(probe.parameters(), lr=3e-3), []
    torch.manual_seed(1)
    for _ in range(50):
        loss = nn.functional.cross_entropy(probe(tokens), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_learning_a_probe(rate):
    """The losses are torch's, in float64 to 1e-9, and in float32 as near to those as of torch in two orders of sums."""
    torch.manual_seed(0)
    classes, channels = torch.arange(32) % 4, torch.randperm(C)
    tokens = torch.randn(32, N, C) + torch.randn(4, 1, C)[classes]
    plain = Probe(rate)
    exact = losses_of(copy.deepcopy(plain).double(), tokens.double(), classes)
    assert exact[-1] < 0.1 * exact[0]
    in_float64 = losses_of(fused_copy(copy.deepcopy(plain).double()), tokens.double(), classes)
    torch.testing.assert_close(in_float64, exact, rtol=1e-9, atol=0)
    with assert_runs(*(() if rate else (FORWARD, BACKWARD))):
        fused = losses_of(fused_copy(plain), tokens, classes)
    orders = (plain.in_another_order(channels), tokens[..., channels]), (plain, tokens)
    unfused = [losses_of(*order, classes) for order in orders]
    assert_parity(fused, max(unfused, key=lambda losses: (losses - exact).abs().max()), exact)


def test_the_report_says_that_calls_decide():
    model = nn.ModuleList([nn.MultiheadAttention(C, HEADS), nn.MultiheadAttention(C, HEADS, add_bias_kv=True)])
    for _ in range(2):  # the second time it is fused already
        replaced, left = str(tokenfusion.fuse(model)).splitlines()[1:]
        assert replaced.endswith(
            "replaced (single_query_attention), decided per call: few queries over one tensor of keys and values"
        )
        assert "left alone" in left and "per call" not in left


def test_the_class_is_torchs():
    fused = fused_copy(Pool({}, {}))
    assert isinstance(fused.attn, nn.MultiheadAttention) and type(fused.attn) is MultiheadAttention


def test_a_small_call_runs_torchs_forward(monkeypatch):
    module = nn.ModuleList([nn.MultiheadAttention(48, 4, batch_first=True).eval()])
    tokenfusion.fuse(module, strict=True)
    tokens, query = torch.randn(2, 30, 48), torch.randn(2, 1, 48)
    for least, operators in ((tokens.numel() * 48, [FORWARD]), (tokens.numel() * 48 + 1, [])):
        monkeypatch.setattr("tokenfusion.layers.multihead_attention._LEAST_WORTHWHILE", least)
        with torch.no_grad(), assert_runs(*operators):
            module[0](query, tokens, tokens, need_weights=False)


@pytest.mark.parametrize("call", [{}, {"need_weights": False}], ids=["weights", "none"])
def test_tokens_made_in_inference_mode(call):
    """torch copies some that are not contiguous, and trains."""
    plain, (query, _) = Pool({"batch_first": True}, call), inputs(batch_first=True)
    with torch.inference_mode():
        tokens = torch.randn(B, N, C)
    query.requires_grad_()
    with assert_runs():
        outs = [model(query, tokens) for model in (plain, fused_copy(plain))]
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), query) for out in outs])
