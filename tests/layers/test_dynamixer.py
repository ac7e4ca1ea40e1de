"""The DynaMixer layers against the official code's values and against the plain form."""

import copy

import pytest
import torch

import tokenfusion
from tests.crossvit import randomize
from tests.golden import check_golden
from tests.parity import assert_parity, assert_runs
from tokenfusion import layers
from tokenfusion.kernels import extension, gated_sum
from tokenfusion.kernels.dynamic_mixing import reference
from tokenfusion.kernels.gated_sum import op as gated_sum_op
from tokenfusion.layers import dynamixer

GOLDEN = "dynamixer_official.safetensors"
FORWARD, BACKWARD = "dynamic_mixing_cpu", "dynamic_mixing_backward_cpu"
SUM = ["gated_sum_out_cpu"] if torch.float32 in extension.own_product_dtypes() else []  # not on every processor
ABLATIONS = [
    dict(),
    dict(row_mixing=False),
    dict(column_mixing=False),
    dict(channel_mixing=False),
    dict(reweighting=False),
    dict(channel_mixing=False, reweighting=False),
    dict(row_mixing=False, channel_mixing=False),
    dict(row_mixing=False, column_mixing=False),
    dict(shared=True),
    dict(generator="random"),
    dict(generator="dense"),
]


def block_of(resolution=(7, 7), dim=24, **options) -> layers.DynaMixerBlock:
    torch.manual_seed(0)
    return randomize(layers.DynaMixerBlock(dim, resolution, 4, 2, **options))


def plain(block: layers.DynaMixerBlock, x: torch.Tensor) -> torch.Tensor:
    """The block by its definition: each part with its linear layer, the reweighting of their sum, the projection."""

    def mixed(op, dim):
        if op.generator != "dynamic":
            return op.mix(x, dim)
        weights = op.compress.weight, op.compress.bias, op.generate.weight, op.generate.bias
        return reference.dynamic_mixing(x, *weights, segments=op.num_head, dim=dim)

    directions = [(block.mix_h, 1), (block.mix_h if block.shared else block.mix_w, 2)]
    outs = [op.out(mixed(op, dim)) for op, dim in directions if op is not None]
    if block.mlp_c is not None:
        outs.append(block.mlp_c(x))
    if block.reweight is None:
        return block.proj(sum(outs))
    shares = block.reweight(sum(outs).mean(dim=(1, 2))).unflatten(-1, (block.dim, len(outs))).softmax(-1)
    return block.proj(sum(out * shares[:, None, None, :, i] for i, out in enumerate(outs)))


def outputs_and_gradients(block, function, x):
    x = x.detach().requires_grad_()
    block.zero_grad()
    out = function(x)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return {"out": out, "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_has_the_official_values(dtype):
    check_golden(GOLDEN, "op.", layers.DynaMixerOp(24, 8, 4, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_has_the_official_values(dtype):
    check_golden(GOLDEN, "block.", layers.DynaMixerBlock(24, 8, 4, 2, dtype=dtype))


@pytest.mark.parametrize(
    "options, printed",
    [
        (dict(), 26_265_960),
        (dict(generator="random"), 25_307_496),
        (dict(generator="dense"), 32_718_184),
        (dict(row_mixing=False), 22_919_528),
        (dict(column_mixing=False), 22_919_528),
        (dict(channel_mixing=False), 23_495_016),
        (dict(reweighting=False), 24_034_152),
        (dict(shared=True), 23_478_632),
    ],
    ids=str,
)
def test_parameters_of_the_ablations(options, printed):
    """DynaMixer-S with the blocks of Tables 6 and 8: 4 layers of 32 x 32 tokens, 14 of 16 x 16."""
    total = 3 * 49 * 192 + 192 + 192 * 4 * 384 + 384 + 2 * 384 + 384 * 1000 + 1000  # patches, norm, head
    for dim, resolution, segments, count in ((192, 32, 8, 4), (384, 16, 16, 14)):
        block = layers.DynaMixerBlock(dim, resolution, segments, 2, device="meta", **options)
        total += count * (sum(p.numel() for p in block.parameters()) + 6 * dim * dim + 8 * dim)  # MLP and norms
    assert total == printed


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_training_obeys_the_parity_rule(options, dtype, by_kernel, monkeypatch):
    monkeypatch.setattr(gated_sum_op, "_LARGE_MATRIX", 0 if by_kernel else 1 << 60)
    block = block_of(**options).to(dtype)
    x = torch.randn(3, 7, 7, 24).to(dtype)
    exact = copy.deepcopy(block).double()
    actual = outputs_and_gradients(block, block, x)
    unfused = outputs_and_gradients(block, lambda x: plain(block, x), x)
    expected = outputs_and_gradients(exact, lambda x: plain(exact, x), x.double())
    for name, want in expected.items():
        assert_parity(actual[name], unfused[name], want, name=name)


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("resolution", [(7, 7), (12, 12), (5, 20)], ids=str)  # 49 tokens, and more than 3 * 24
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_obeys_the_parity_rule(options, resolution, dtype, monkeypatch):
    if options.get("shared") and resolution[0] != resolution[1]:
        pytest.skip("one operation for both directions needs a square")
    monkeypatch.setattr(dynamixer, "_PIECE_BYTES", 2 * resolution[0] * resolution[1] * 24 * dtype.itemsize)
    block = block_of(resolution, **options).to(dtype)
    x = torch.randn(3, *resolution, 24).to(dtype)  # two pieces, where the weights differ among images
    with torch.no_grad():
        exact = plain(copy.deepcopy(block).double(), x.double())
        assert_parity(block(x), plain(block, x), exact)


def test_synthesizers_generate_as_described():
    """Dense: a target's weights come from that token alone. Random: from no token."""
    x = torch.randn(2, 7, 24)
    other = x.clone()
    other[:, 3] += 1
    for generator in ("dense", "random"):
        op = layers.DynaMixerOp(24, 7, 4, generator=generator)
        matrices, changed = op.matrices(x), op.matrices(other)  # [..., S, source, target]
        torch.testing.assert_close(matrices.sum(-2), torch.ones_like(matrices[..., 0, :]))
        same = (matrices == changed).expand(2, 4, 7, 7).all(dim=(0, 1, 2))
        assert same.tolist() == [generator == "random" or target != 3 for target in range(7)]


def test_kernels_run():
    block, x = block_of(), torch.randn(2, 7, 7, 24)
    with assert_runs(FORWARD, BACKWARD, *SUM):
        block(x).sum().backward()
    with torch.no_grad(), assert_runs(FORWARD, *SUM):
        block(x)
    assert all(parameter.grad is not None for parameter in block.parameters())
    with tokenfusion.backend("reference"), assert_runs():
        torch.testing.assert_close(block(x), plain(block, x))


def test_empty_batch():
    block, x = block_of(), torch.randn(0, 7, 7, 24)
    assert block(x).shape == x.shape
    with torch.no_grad():
        assert block(x).shape == x.shape


def test_strided_input():
    block, x = block_of(), torch.randn(2, 24, 7, 7).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), plain(block, x))
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(block, x))


@pytest.mark.parametrize("frozen", ["weights", "input", "operations"])
def test_frozen_parts(frozen):
    block, x = block_of(), torch.randn(2, 7, 7, 24)
    block.requires_grad_(frozen != "weights")
    if frozen == "operations":
        block.mix_h.requires_grad_(False)
        block.mix_w.requires_grad_(False)
    gradients = []
    for function in (block, lambda x: plain(block, x)):
        block.zero_grad()
        tokens = x.clone().requires_grad_(frozen != "input")
        function(tokens).square().sum().backward()
        gradients.append([tokens.grad, *(p.grad for p in block.parameters())])
    for got, expected in zip(*gradients, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_second_order():
    block = block_of((2, 3), dim=8).double()
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, x, fast_mode=True)


def test_batched_gradients(monkeypatch):
    monkeypatch.setattr(gated_sum_op, "_LARGE_MATRIX", 0)
    part, weight, bias, gates = torch.randn(2, 5, 4), torch.randn(4, 4), torch.randn(4), torch.rand(2, 1, 4)
    leaves = [tensor.requires_grad_() for tensor in (part, weight, bias, gates)]
    out = gated_sum([part], [weight], [bias], gates)
    grads = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads))
    for actual, expected in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training):
    block, x = block_of(), torch.randn(2, 7, 7, 24)
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unfused = plain(block, x)
            actual = block(x)
        assert_parity(actual, unfused, plain(copy.deepcopy(block).double(), x.double()))


@pytest.mark.parametrize("training", [False, True])
def test_autocast_of_weights_in_the_other_half_precision(training):
    block, x = block_of().half(), torch.randn(2, 7, 7, 24)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(block(x), plain(block, x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training):
    torch.compiler.reset()
    block, x = block_of(), torch.randn(2, 7, 7, 24)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training), assert_runs(*((FORWARD, BACKWARD) if training else (FORWARD,))):
        out = compiled(x)
        if training:
            out.square().sum().backward()
    torch.testing.assert_close(out, plain(block, x))
    if training:
        got = {name: parameter.grad for name, parameter in block.named_parameters()}
        block.zero_grad()
        plain(block, x).square().sum().backward()
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def held_bytes(function, x, parameters) -> int:
    """Bytes that the backward pass holds on to, beyond the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *parameters)}
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(x)
    assert out.requires_grad
    return sum(size for pointer, size in held.items() if pointer not in known)


def test_little_is_held_for_the_backward_pass():
    block = randomize(layers.DynaMixerBlock(96, 32, 4, 2))
    x = torch.randn(1, 32, 32, 96, requires_grad=True)
    parameters = list(block.parameters())
    assert held_bytes(block, x, parameters) < 0.5 * held_bytes(lambda x: plain(block, x), x, parameters)
    op = block.mix_h
    weights = op.compress.weight, op.compress.bias, op.generate.weight, op.generate.bias
    mixing = held_bytes(lambda x: op.mix(x, 1), x, parameters)
    assert mixing < 0.2 * held_bytes(
        lambda x: reference.dynamic_mixing(x, *weights, segments=op.num_head, dim=1), x, parameters
    )


def test_inference_writes_no_map_of_a_part():
    from tokenfusion.measure import peak_extra_bytes

    block = randomize(layers.DynaMixerBlock(48, 32, 4, 2))
    x = torch.randn(4, 32, 32, 48)
    with torch.no_grad():
        peak = peak_extra_bytes(lambda: block(x))
    assert peak < 4.5 * x.nbytes  # both mixed maps, the output, and what is small: no output of a linear layer


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (dict(dim=24, resolution=7, num_head=5), ["num_head", "5", "24"]),
        (dict(dim=24, resolution=0), ["seq_len", "0"]),
        (dict(dim=24, resolution=7, reduced_dim=0), ["reduced_dim", "0"]),
        (dict(dim=24, resolution=7, generator="static"), ["generator", "'static'", "'dynamic', 'random', 'dense'"]),
        (dict(dim=24, resolution=(7, 8), shared=True), ["shared", "(7, 8)"]),
        (dict(dim=24, resolution=7, shared=True, row_mixing=False), ["shared", "row_mixing False"]),
        (dict(dim=24, resolution=7, row_mixing=False, column_mixing=False, channel_mixing=False), ["row_mixing"]),
    ],
)
def test_bad_arguments(arguments, parts):
    with pytest.raises(ValueError) as caught:
        layers.DynaMixerBlock(**arguments)
    for part in parts:
        assert part in str(caught.value)


def test_an_input_of_another_size_is_refused():
    for shape in ((2, 7, 8, 24), (2, 7, 7, 25), (2, 49, 24)):
        with pytest.raises(ValueError, match=r"x: got shape .* expected \[B, 7, 7, 24\]"):
            block_of()(torch.randn(shape))
    with pytest.raises(ValueError, match="N = 8 tokens .* D = 24"):
        layers.DynaMixerOp(24, 8, 4)(torch.randn(5, 7, 24))
