"""What fuse leaves alone in class attention and attention pooling, and the reason that it gives."""

from functools import partial, wraps

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d, AttentionPoolLatent
from timm.models import cait, naflexvit, volo, xcit
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import tokenfusion
from tests.parity import assert_runs
from tests.surgery.families import images, small_model

CAIT, VOLO = partial(cait.LayerScaleBlockClassAttn, 16, 2), partial(volo.ClassBlock, 16, 2)
XCIT = partial(xcit.ClassAttentionBlock, 16, 2)
LATENT, MAP = partial(AttentionPoolLatent, 16, num_heads=2), partial(AttentionPool2d, 16, feat_size=3, num_heads=2)


def left(module):
    """Name -> reason, and nothing but the forward passes of what was replaced has changed."""
    before = {name: type(part) for name, part in module.named_modules()}
    report = tokenfusion.fuse(module)
    after = {name: type(part) for name, part in module.named_modules()}
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {part.name for part in report.replaced}
    assert all(issubclass(after[name], before[name]) for name in changed)
    return {part.name: part.reason for part in report.left}


@pytest.mark.parametrize(
    "module, names",
    [
        (CAIT(attn_drop=0.1), ["", "attn"]),
        (VOLO(attn_drop=0.1), ["", "attn"]),
        (XCIT(attn_drop=0.1), ["attn"]),
    ],
)
def test_attention_dropout_in_training(module, names):
    reasons = left(module.train())
    assert list(reasons) == names
    assert all("dropout 0.1 in training needs the attention weights" in reason for reason in reasons.values())
    assert left(module.eval()) == {}


def test_normalised_keys():
    reason = left(LATENT(qk_norm=True))[""]
    assert reason == "k_norm is LayerNorm: each key is normalised after its projection"


def test_rotary_positions():
    model = small_model("rotary resnet").eval()
    assert left(model) == {"head": "pos_embed is rotary: each key is rotated after its projection"}
    with pytest.raises(ValueError, match="rotary"):
        tokenfusion.fuse(model, strict=True)


def test_so_many_latents_that_projections_cost_less():
    assert left(LATENT(latent_len=3)) == {}
    assert "latent: 8 queries (heads x latents) of 16 channels" in left(LATENT(latent_len=4))[""]


def test_maps_that_are_not_pooled():
    assert left(MAP(pool_type=""))[""] == "pool_type is '': every position is a query"
    assert "dropout 0.2 in training" in left(MAP(drop_rate=0.2).train())[""]
    assert left(MAP(drop_rate=0.2).eval()) == {}


class Changed(nn.Linear):
    pass


@pytest.mark.parametrize(
    "make, path, names",
    [
        (CAIT, "attn.k", {"": "attn.k", "attn": "k"}),
        (VOLO, "attn.kv", {"": "attn.kv", "attn": "kv"}),
        (XCIT, "attn.v", {"attn": "v"}),
        (LATENT, "kv", {"": "kv"}),
        (MAP, "qkv", {"": "qkv"}),
    ],
)
def test_projections_that_somebody_changed(make, path, names):
    module = make()
    old = module.get_submodule(path)
    module.set_submodule(path, Changed(old.in_features, old.out_features))
    assert left(module) == {name: f"{part} is Changed, expected torch's Linear" for name, part in names.items()}
    module = make()
    module.get_submodule(path).register_full_backward_pre_hook(lambda *_: None)
    assert left(module) == {name: f"{part} has hooks, which would not run as before" for name, part in names.items()}


@pytest.mark.parametrize("make", [CAIT, VOLO])
def test_a_block_left_alone_still_has_its_attention_replaced(make):
    block = make()
    block.norm1 = nn.Identity()
    assert left(block) == {"": "norm1 is Identity, expected torch's LayerNorm over the channels"}
    assert tokenfusion.fuse(block.attn).replaced
    block.norm1 = nn.LayerNorm(16)
    assert left(block) == {}  # and the block takes an attention that is replaced already
    tokenfusion.unfuse(block)
    assert type(block).__module__ == type(block.attn).__module__ == make.func.__module__


@pytest.mark.parametrize("make", [CAIT, VOLO])
def test_an_attention_that_somebody_changed(make):
    block = make()
    block.attn.forward = lambda x: x[:, :1]
    reasons = left(block)
    assert reasons == {"": "attn has its forward set on the instance", "attn": "its forward was set on the instance"}
    block = make()
    block.attn = nn.Identity()
    assert "attn is Identity, expected timm's Class" in left(block)[""]
    block = make()
    block.attn.attn_drop = nn.AlphaDropout(0.1)
    assert left(block)["attn"] == "attn_drop is AlphaDropout, expected torch's Dropout"


def test_subclasses_are_not_known():
    class Other(AttentionPoolLatent):
        pass

    assert not tokenfusion.fuse(nn.Sequential(Other(16, num_heads=2))).modules


def test_hooks_on_the_replaced_modules_themselves_run():
    model, seen = small_model("cait").eval(), []
    block = model.blocks_token_only[0]
    block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    block.mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    tokenfusion.fuse(model, strict=True)
    with assert_runs("single_query_attention_cpu"), torch.no_grad():
        model(images("cait"))
    assert seen == [(2, 1, 32), (2, 1, 32)]


def test_a_mask_from_the_model_takes_timms_path():
    model = small_model("naflex").eval()
    assert isinstance(model, naflexvit.NaFlexVit)
    patches = {"patches": torch.randn(2, 9, 16 * 16 * 3), "patch_coord": torch.cartesian_prod(*[torch.arange(3)] * 2)}
    patches["patch_coord"] = patches["patch_coord"].expand(2, -1, -1)
    patches["patch_valid"] = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    with torch.no_grad():
        expected = model(patches)
        tokenfusion.fuse(model, strict=True)
        with assert_runs():
            assert torch.equal(model(patches), expected)


OF_F = ("linear", "layer_norm", "scaled_dot_product_attention", "multi_head_attention_forward", "softmax")
OF_F += ("dropout", "conv_transpose2d", "conv2d", "gelu", "relu", "silu")
OF_TORCH = ("softmax", "matmul", "bmm", "baddbmm", "layer_norm", "cat")
FUNCTIONS = [(F, f"F.{name}") for name in OF_F] + [(torch, f"torch.{name}") for name in OF_TORCH]
FUNCTIONS += [(torch.Tensor, f"torch.Tensor.{name}") for name in ("softmax", "matmul", "__matmul__")]


@pytest.mark.parametrize("owner, path", FUNCTIONS, ids=[path for _, path in FUNCTIONS])
def test_a_function_that_somebody_replaced(owner, path, monkeypatch, caplog):
    name = path.rpartition(".")[2]
    fused, function = LATENT(), getattr(owner, name)
    tokenfusion.fuse(fused, strict=True)
    with monkeypatch.context() as replaced:
        replaced.setattr(owner, name, wraps(function)(lambda *args, **options: function(*args, **options)))
        assert left(LATENT())[""] == f"{path} was replaced"
        fused(torch.randn(2, 5, 16))
    assert f"runs its original forward: {path} was replaced" in caplog.text
    assert not left(LATENT())


@pytest.mark.parametrize(
    "path, reason",
    [
        ("torch.nn.Linear.forward", "attn.k: the forward of Linear was replaced"),
        ("torch.nn.Module.__call__", "attn: the __call__ of ClassAttn was replaced"),
        ("timm.models.cait.ClassAttn.forward", "attn: the forward of ClassAttn was replaced"),
    ],
)
def test_a_method_that_somebody_replaced_before_the_package_saw_its_class(path, reason, run_python):
    run_python(
        f"""
        import functools, timm, torch
        from timm.models import cait
        owner, name = {path.rpartition(".")[0]}, "{path.rpartition(".")[2]}"
        method, calls = getattr(owner, name), []

        @functools.wraps(method)
        def seen(self, *args, **kwargs):
            calls.append(type(self).__name__)
            return method(self, *args, **kwargs)

        setattr(owner, name, seen)
        import tokenfusion
        model, tokens, token = cait.LayerScaleBlockClassAttn(16, 2).eval(), torch.randn(2, 5, 16), torch.randn(2, 1, 16)
        expected = model(tokens, token)
        of_plain = [*calls]
        reports = {{module.name: module for module in tokenfusion.fuse(model).modules}}
        assert not reports[""].replaced and reports[""].reason == "{reason}", reports[""].reason
        calls.clear()
        assert torch.equal(model(tokens, token), expected) and calls == of_plain, (calls, of_plain)
        """
    )


def _first_token_twice(self, x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x[:, :1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_compiles_the_forward_that_the_class_has_now(monkeypatch):
    model, x = nn.Sequential(cait.ClassAttn(24, 6)).eval(), torch.randn(2, 5, 24)  # a size of this test alone
    tokenfusion.fuse(model, strict=True)
    monkeypatch.setattr(cait.ClassAttn, "forward", _first_token_twice)
    torch.testing.assert_close(torch.jit.script(model)(x), 2.0 * x[:, :1])


@pytest.mark.filterwarnings("ignore")
def test_what_is_prepared_for_quantisation():
    example = torch.randn(1, 16, 4, 4)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(16, 8, 2, 2)).eval()
    qconfig = quantization.QConfig(quantization.default_observer, quantization.default_weight_observer)
    prepared = quantize_fx.prepare_fx(model, quantization.QConfigMapping().set_global(qconfig), (example,))
    assert left(prepared) == {"1": "it is prepared for quantisation, which would not find a fused module"}
    prepared(example)
    converted = quantize_fx.convert_fx(prepared).get_submodule("1")
    assert isinstance(converted, torch.ao.nn.quantized.ConvTranspose2d)
