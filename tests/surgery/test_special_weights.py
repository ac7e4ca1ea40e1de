"""NaN and infinities in parameters come out of a fused module as out of the plain one, in inference, too, and so does
what parameters of a subclass mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokenfusion
from tests.surgery.subjects import SUBJECTS, Subject
from tokenfusion.layers import SingleQueryAttention

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


class Sharper(torch.Tensor):
    """A tensor that makes tensors of its kind, and attention of another temperature."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.scaled_dot_product_attention, torch.Tensor.softmax):
            args = (2.0 * args[0], *args[1:])
        return super().__torch_function__(func, types, args, kwargs)


OWN = Subject(lambda: SingleQueryAttention(16, 4, num_latents=1), (3, 6, 16), ("k", "v"))


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("kind", [*SUBJECTS, "SingleQueryAttention"])
def test_parameters_of_a_subclass(kind, fused_first):
    """Of parts that are called, too: the query of an attention is of the subclass then."""
    subject = SUBJECTS.get(kind, OWN)
    for name, _ in subject.model().named_parameters():
        results = []
        for fuses in (False, True):
            model = subject.model().eval()
            for step in (fused_first, not fused_first):
                if step and fuses:
                    tokenfusion.fuse(model)
                elif not step:
                    owner, _, own = name.rpartition(".")
                    value = model.get_parameter(name).detach().as_subclass(Sharper)
                    setattr(model.get_submodule(owner), own, nn.Parameter(value))
            if kind == "SingleQueryAttention" and not fuses:
                model.module.forward = model.module.plain_forward
            with torch.no_grad():
                results.append(model(subject.inputs()).as_subclass(torch.Tensor))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5, msg=f"{kind}, {name}")
