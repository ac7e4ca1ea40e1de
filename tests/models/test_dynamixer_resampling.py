"""Checkpoints of DynaMixer at another resolution."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tokenfusion
from tests.models.test_dynamixer import SMALL, images, small
from tokenfusion.layers import DynaMixerOp
from tokenfusion.models.dynamixer_resampling import resampled, resampling_matrix

GENERATORS = ("dynamic", "random", "dense")


@pytest.mark.parametrize("old, new", [(8, 8), (8, 12), (12, 8), (7, 13), (1, 4), (4, 1)])
def test_rows_of_the_matrix_sum_to_one(old, new):
    matrix = resampling_matrix(old, new)
    assert matrix.shape == (new, old)
    torch.testing.assert_close(matrix.sum(1), torch.ones(new, dtype=torch.float64))
    if old == new:
        assert torch.equal(matrix, torch.eye(old, dtype=torch.float64))


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_same_resolution_changes_nothing(generator):
    model = small(generator=generator)
    before = model.state_dict()
    after = model.checkpoint_filter(before)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def centres(length: int) -> torch.Tensor:
    return (torch.arange(length, dtype=torch.float64) + 0.5) / length


def smooth_op(length: int, generator: str) -> nn.Sequential:
    """An operation of one channel and one segment whose logits are smooth functions of the places of its tokens.

    They are sampled at the cells' centres. The sum over the tokens that generate them is an integral, hence 1 / N.
    """
    op = DynaMixerOp(1, length, 1, 1, generator=generator, dtype=torch.float64)
    source, target, token = centres(length)[:, None, None], centres(length)[None, :, None], centres(length)
    near = -8 * (source - target - 0.05).square().squeeze(2)
    with torch.no_grad():
        if generator == "dynamic":
            weight = 3 * torch.cos(4 * source + 2 * target) * torch.sin(3 * token) / length
            op.generate.weight.copy_(weight.flatten(0, 1))
            op.generate.bias.copy_(near.flatten())
        elif generator == "random":
            op.logits.copy_(near.unsqueeze(0))
        else:
            op.generate.fc2.weight.copy_(3 * torch.sin(4 * source.squeeze(2)))
            op.generate.fc2.bias.copy_(-8 * (source.flatten() - 0.3).square())
    return nn.Sequential(op)


def densities(op: DynaMixerOp) -> torch.Tensor:
    """Its mixing matrix [source, target] times N, for smooth tokens."""
    tokens = (1 + torch.sin(2 * centres(op.seq_len))).unsqueeze(1)
    if op.generator == "dynamic":
        logits = op.generate(tokens.flatten()).view(op.seq_len, op.seq_len)
    elif op.generator == "random":
        logits = op.logits[0]
    else:
        logits = op.generate.fc2(tokens).T
    return op.seq_len * logits.softmax(dim=0)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("old, new", [(16, 24), (16, 32), (32, 16), (24, 17)])
def test_a_smooth_mixing_matrix_keeps_its_shape(old, new, generator):
    """Against the same functions sampled at the new resolution; the largest errors are at the border of the image."""
    expected, got = smooth_op(new, generator), smooth_op(new, generator)
    got.load_state_dict(resampled(smooth_op(old, generator).state_dict(), got))
    expected, got = densities(expected[0]), densities(got[0])
    torch.testing.assert_close(got.sum(0), torch.full((new,), float(new), dtype=torch.float64))
    assert (got - expected).abs().max() < 0.06 * expected.max()
    assert (got - expected).abs().mean() < 0.02 * expected.mean()


def test_constant_features_generate_the_same_logits_on_average():
    op, larger = smooth_op(16, "dynamic")[0], smooth_op(24, "dynamic")
    larger.load_state_dict(resampled({f"0.{k}": v for k, v in op.state_dict().items()}, larger))
    logits = op.generate(torch.ones(16, dtype=torch.float64)).view(16, 16)
    matrix = resampling_matrix(16, 24)
    expected = matrix @ logits @ matrix.T
    torch.testing.assert_close(larger[0].generate(torch.ones(24, dtype=torch.float64)).view(24, 24), expected)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("size", [84, (84, 56), (42, 112)], ids=str)
def test_fine_tuning_at_another_size(generator, size, tmp_path):
    """A checkpoint of 56 x 56 images loads, changes generators alone, and trains."""
    model = small(generator=generator)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings = SMALL | {"generator": generator, "img_size": size}
    other = tokenfusion.create_model("dynamixer_s", checkpoint_path=tmp_path / "model.safetensors", **settings)
    changed = {name for name, value in other.state_dict().items() if not _equal(value, model.state_dict()[name])}
    assert changed and all("generate" in name or name.endswith("logits") for name in changed)
    logits = other(images(other))
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", ["network.0.0.attn.mix_h.generate.weight", "network.0.0.attn.mix_w.generate.bias"])
def test_what_is_no_generator_is_named(name):
    model = small()
    state_dict = model.state_dict() | {name: torch.zeros(5, 7)}
    with pytest.raises(RuntimeError, match=rf"{name} got \(5, 7\)"):
        model.load_state_dict(model.checkpoint_filter(state_dict))
