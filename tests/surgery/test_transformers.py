"""Hugging Face's heads that pool by nn.MultiheadAttention, in small configurations without weights."""

import pytest
import torch

import tokenfusion
from tests.drop_in import FORWARD
from tests.parity import assert_runs

pytest.importorskip("transformers")
SIZES = dict(
    hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, image_size=32, patch_size=8
)


def siglip():
    from transformers.models.siglip import modeling_siglip as siglip

    return siglip.SiglipVisionModel(siglip.SiglipVisionConfig(**SIZES)), {"pixel_values": torch.randn(2, 3, 32, 32)}


def siglip2(implementation="eager"):
    from transformers.models.siglip2 import modeling_siglip2 as siglip2

    config = siglip2.Siglip2VisionConfig(**SIZES, num_patches=16, attn_implementation=implementation)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    inputs = {"pixel_values": torch.randn(2, 16, 3 * 8 * 8), "spatial_shapes": torch.tensor([[4, 4], [3, 3]])}
    return siglip2.Siglip2VisionModel(config), inputs | {"pixel_attention_mask": mask}


@pytest.mark.parametrize(
    "make, kernels",
    [(siglip, (FORWARD,)), (siglip2, ()), (lambda: siglip2("sdpa"), ())],
    ids=["SigLIP", "SigLIP 2", "SigLIP 2, scaled_dot_product_attention"],
)
def test_vision_models(make, kernels):
    """SigLIP 2 pools with a mask, by the weights."""
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).pooler_output
        report = tokenfusion.fuse(model, strict=True)
        with assert_runs(*kernels):
            pooled = model(**inputs).pooler_output
    assert [module.kind for module in report.modules] == ["MultiheadAttention"]
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(pooled, expected)
