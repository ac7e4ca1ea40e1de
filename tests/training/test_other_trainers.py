"""The few lines of docs/training.md with which other trainers train a fused model."""

import re

import pytest
import torch

import tokenfusion
from tests.conftest import ROOT
from tests.parity import assert_runs
from tests.training.small import CROSSVIT


def lines(heading):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    return re.search(rf"^## {heading}\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize("heading, package", [("Lightning", "lightning"), ("Hugging Face's Trainer", "transformers")])
def test_trains_a_fused_model(heading, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.manual_seed(0)
    model = tokenfusion.create_model("tokenfusion_crossvit_9_240", num_classes=3, **CROSSVIT)
    tokenfusion.fuse(model, strict=True)
    images = torch.randn(64, 3, 16, 16)
    data = [(image, label % 3) for label, image in enumerate(images)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    code = lines(heading)
    assert len([line for line in code.splitlines() if line]) <= 15
    with assert_runs("single_query_attention_cpu", "single_query_attention_backward_cpu"):
        exec(code, {"model": model, "train": data, "test": data[:16], "__name__": "program"})
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) * 0.9
