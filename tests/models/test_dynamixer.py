"""DynaMixer: the official code's values, every row of Tables 1 and 5 to 8 of arXiv:2201.12083, arguments."""

import pytest
import torch
from timm.models._features import FeatureGetterNet
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from tests.crossvit import randomize
from tests.golden import check_golden
from tests.parity import assert_parity, assert_runs
from tokenfusion.kernels import extension
from tokenfusion.models.dynamixer import DynaMixer
from tokenfusion.models.dynamixer_reference import plain

SMALL = dict(layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), num_heads=(4, 8, 8, 8), img_size=56, num_classes=11)
SUM = ["gated_sum_out_cpu"] if torch.float32 in extension.own_product_dtypes() else []  # not on every processor


def small(**options) -> DynaMixer:
    torch.manual_seed(0)
    return randomize(DynaMixer(**(SMALL | options)))


def images(model: DynaMixer, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.in_chans, *model.img_size, generator=generator)


@pytest.mark.parametrize("form", [lambda model: model, plain], ids=["model", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_values(dtype, form):
    """Names of parameters, logits and every gradient."""
    check_golden("dynamixer_official.safetensors", "model.", form(DynaMixer(**SMALL, dtype=dtype)))


def test_official_values_in_inference():
    model = DynaMixer(**SMALL)
    check_golden("dynamixer_official.safetensors", "model.", model)  # loads the parameters
    exact = plain(model).double()
    x = images(model, batch=3)
    with torch.inference_mode(), assert_runs("dynamic_mixing_cpu", *SUM):
        got = model(x)
    with torch.no_grad():
        assert_parity(got.clone(), plain(model)(x), exact(x.double()))


def counts(name: str = "dynamixer_s", **options) -> tuple[int, float]:
    """Parameters and G multiply-adds for one image."""
    model = tokenfusion.create_model(name, device="meta", **options).eval()
    with FlopCounterMode(display=False) as counter, tokenfusion.backend("reference"):
        model(torch.empty(1, 3, 224, 224, device="meta"))  # with gradients: inference may multiply weights first
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


# Parameters and G multiply-adds counted in the official code, or in the structure that gives what the paper prints, and
# the paper's millions and G. Its millions are partly rounded and partly truncated. A shared operation compresses the
# tokens once for both directions: 7.252 G instead of 7.302.
ROWS = {
    "1: S": ({}, 26_265_960, 7.302, 26, 7.3),
    "1: M": ({"name": "dynamixer_m"}, 57_128_264, 16.981, 57, 17.0),
    "1: L": ({"name": "dynamixer_l"}, 97_818_088, 27.343, 97, 27.4),
    "5: D / S = D": ({"num_heads": 1}, 25_920_944, 7.025, 26, None),
    "5: D / S = 96": ({"num_heads": (2, 4, 4, 4)}, 25_988_712, 7.073, 26, None),
    "5: D / S = 48": ({"num_heads": (4, 8, 8, 8)}, 26_081_128, 7.149, 26, None),
    "5: D / S = 24": ({"num_heads": (8, 16, 16, 16)}, 26_265_960, 7.302, 26, None),
    "6: Synthesizer (Random)": ({"generator": "random"}, 25_307_496, 6.996, 25, None),
    "6: Synthesizer (Dense)": ({"generator": "dense"}, 32_718_184, 9.462, 32, None),
    "7: d = 1": ({"reduced_dims": 1}, 25_704_296, 7.149, 26, None),
    "7: d = 2": ({"reduced_dims": 2}, 26_265_960, 7.302, 26, None),
    "7: d = 4": ({"reduced_dims": 4}, 27_389_288, 7.609, 27, None),
    "7: d = 8": ({"reduced_dims": 8}, 29_635_944, 8.221, 29, None),
    "8: - column mixing": ({"column_mixing": False}, 22_919_528, 6.422, 23, None),
    "8: - row mixing": ({"row_mixing": False}, 22_919_528, 6.422, 23, None),
    "8: - channel fusion": ({"channel_mixing": False}, 23_495_016, 6.622, 23, None),
    "8: - reweighting": ({"reweighting": False}, 24_034_152, 7.300, 24, None),
    "8: + sharing": ({"shared": True}, 23_478_632, 7.252, 23, None),
}


@pytest.mark.parametrize("row", ROWS)
def test_counts(row):
    options, parameters, multiply_adds, printed_millions, printed_g = ROWS[row]
    total, macs = counts(**options)
    assert total == parameters
    assert int(total / 1e6) == printed_millions or round(total / 1e6) == printed_millions
    if printed_g is not None:
        assert macs == pytest.approx(printed_g, abs=0.06)  # L is 27.40 with the LayerNorms that the paper's tool counts
    assert macs == pytest.approx(multiply_adds, rel=1e-3)


ABLATIONS = [options for options, *_ in ROWS.values() if options.keys() & {"generator", "shared", "reweighting"}]
ABLATIONS += [{"row_mixing": False}, {"column_mixing": False}, {"channel_mixing": False}, {"num_heads": 1}]
ABLATIONS += [{"row_mixing": False, "channel_mixing": False}, {"reduced_dims": 8}, {"img_size": (56, 84)}]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_ablations_train_and_predict(options):
    model = small(**options)
    x = images(model)
    logits = model(x)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    exact = small(**options).double()(x.double()).detach()
    with torch.inference_mode():
        assert_parity(model(x).clone(), logits.detach(), exact)


def test_training_lowers_the_loss():
    model = small(drop_path_rate=0.1).train()
    x, classes = images(model, batch=8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@torch.no_grad()
def test_a_layer_without_its_mlp():
    model = small().eval()
    layer = model.network[0][0]
    layer.mlp = torch.nn.Identity()
    x = torch.randn(2, 8, 8, 24)
    assert torch.equal(layer(x), layer.plain_forward(x))


def test_a_hook_keeps_what_it_saw():
    model, seen = small().eval(), []
    model.network[0][0].mlp.fc2.register_forward_hook(
        lambda module, inputs, output: seen.extend((output, output.clone()))
    )
    with torch.no_grad():
        model(images(model))
    assert torch.equal(*seen)


@pytest.mark.parametrize("stage", range(4))
def test_norm_of_the_last_stage_alone(stage):
    """As in timm's models of stages: there is no norm for the others, though some have as many channels."""
    model = small().eval()
    x = images(model)
    (plain_tokens,) = model.forward_intermediates(x, [stage], intermediates_only=True)
    (tokens,) = model.forward_intermediates(x, [stage], norm=True, stop_early=True, intermediates_only=True)
    expected = model.forward_features(x).permute(0, 3, 1, 2) if stage == 3 else plain_tokens
    torch.testing.assert_close(tokens, expected)


def test_features_of_a_pruned_model_are_counted_anew():
    model = small().eval()
    x = images(model)
    expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    for got, feature in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        torch.testing.assert_close(got, feature)
    torch.testing.assert_close(model.forward_intermediates(x, [-1], intermediates_only=True), expected[-1:])


@pytest.mark.parametrize("options", [{"out_indices": (0,)}, {"out_indices": (1, 3), "norm": True}], ids=str)
def test_features_in_torchscript(options):
    extractor = FeatureGetterNet(small().eval(), **options)
    x = images(extractor.model)
    features, scripted = extractor(x), torch.jit.script(extractor)(x)
    assert len(scripted) == len(options["out_indices"])
    for got, expected in zip(scripted, features, strict=True):
        torch.testing.assert_close(got, expected)


def test_resolutions_of_the_official_code():
    assert small(resolutions=(8, 4, 4, 4)).resolutions == [(8, 8), (4, 4), (4, 4), (4, 4)]
    assert small(img_size=(60, 115)).resolutions == [(8, 16), (4, 8), (4, 8), (4, 8)]
    with pytest.raises(ValueError, match=r"resolutions: got \[32, 16, 16, 16\], expected \[\(8, 8\), "):
        small(resolutions=[32, 16, 16, 16])


def test_drop_path_rises_over_all_layers():
    model = small(layers=(2, 1, 1, 1), drop_path_rate=0.4)
    layers = [layer for stage in model.network if isinstance(stage, torch.nn.Sequential) for layer in stage]
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": (4, 8)}, r"num_heads: got \(4, 8\), expected 4 values"),
        ({"embed_dims": (24, 48, 48, 48, 48)}, "embed_dims: got .*expected 4 values"),
        ({"transitions": (True,)}, r"transitions: got \(True,\), expected 3 values"),
        ({"img_size": 7}, r"img_size: got \(7, 7\)"),
        ({"num_heads": 5}, "num_head: got 5, expected a divisor of dim = 24"),
        ({"global_pool": "max"}, "global_pool: got 'max'"),
        ({"generator": "attention"}, "generator: got 'attention'"),
        ({"shared": True, "img_size": (56, 84)}, "shared: got True"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DynaMixer(**(SMALL | options))


@pytest.mark.parametrize("shape", [(2, 3, 56, 63), (2, 1, 56, 56), (3, 56, 56)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"x: got shape .*expected \[B, 3, 56, 56\]; create_model"):
        small()(torch.zeros(shape))
