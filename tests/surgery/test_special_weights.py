"""NaN and infinities in parameters come out of a fused module as out of the plain one, in inference, too."""

import pytest
import torch

import tokenfusion
from tests.surgery.subjects import SUBJECTS

BIASES = {  # of keys, which cancel where they are numbers
    "CrossViT block": "attn.wk.bias",
    "CrossViT stage": "fusion.0.0.attn.wk.bias",
    "CaiT block": "attn.k.bias",
    "CaiT attention": "k.bias",
    "XCiT": "attn.k.bias",
    "VOLO block": "attn.kv.bias",
    "VOLO attention": "kv.bias",
    "latent pooling": "kv.bias",
    "map pooling, separate": "k.bias",
    "attention found, a context": "to_kv.bias",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("training", [False, True])
def test_biases_of_keys(kind, value, training):
    subject, results = SUBJECTS[kind], []
    for fuses in (False, True):
        model = subject.model().eval()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # PyTorch's own attention loses NaN on a CPU
        if fuses:
            assert tokenfusion.fuse(model).replaced
        with torch.no_grad():
            model.module.get_parameter(BIASES[kind])[0] = value
        with torch.set_grad_enabled(training):
            results.append(model(subject.inputs()).isnan())
    plain, fused = results
    assert plain.any()
    assert torch.equal(fused, plain)
