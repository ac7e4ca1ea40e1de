"""Where weights come from: asked once and for a short time, and not at all where none are wanted."""

import logging
import socket
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models._pretrained import PretrainedCfg

import tokenfusion
from tests.models.small import TOKEN_FUSION
from tokenfusion.models import hub

CROSSVIT = "tokenfusion_crossvit_9_240"
WITH_CNN = {name: value for name, value in TOKEN_FUSION.items() if name != "pretrained_cnn"}
HUB = PretrainedCfg(hf_hub_id="timm/test_resnet.r160_in1k")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lookups(monkeypatch) -> list[str]:
    """Sockets are blocked: no name resolves, and each that is looked up is noted."""
    asked = []

    def unresolved(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def refused(*_):
        raise AssertionError("a socket was connected")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(socket.socket, "connect", refused)
    return asked


def test_random_weights_of_the_cnn_are_said_so_after_one_attempt(lookups, caplog):
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        model = tokenfusion.create_model("token_fusion_late", **WITH_CNN)
    assert time.perf_counter() - start < 10
    assert lookups == ["huggingface.co"]
    (record,) = caplog.records
    assert record.name == "tokenfusion"
    assert record.getMessage() == (
        "pretrained_cnn: no weights of test_resnet: https://huggingface.co cannot be reached (Name or service not "
        "known), and its cache has no test_resnet; random ones are used, which a frozen CNN keeps: load a checkpoint, "
        "or pass train_cnn=True"
    )
    assert not any(parameter.requires_grad for parameter in model.cnn.parameters())


@pytest.mark.parametrize(
    "create",
    [
        lambda: tokenfusion.create_model("token_fusion_late", **WITH_CNN, pretrained_cnn=True),
        lambda: tokenfusion.create_model(CROSSVIT, pretrained=True),
        lambda: timm.create_model(CROSSVIT, pretrained=True),
    ],
    ids=["CNN", "create_model", "timm.create_model"],
)
def test_weights_that_were_asked_for_and_cannot_be_had_are_an_error(lookups, caplog, create):
    start = time.perf_counter()
    with pytest.raises(hub.Unavailable, match=r"cannot be reached \(Name or service not known\), and its cache has no"):
        create()
    assert time.perf_counter() - start < 10
    assert lookups == ["huggingface.co"]
    assert not caplog.records


def test_offline_asks_nobody(lookups, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.Unavailable, match="HF_HUB_OFFLINE is set"):
        tokenfusion.create_model(CROSSVIT, pretrained=True)
    assert lookups == []


def test_without_pretrained_and_on_the_meta_device_nobody_is_asked(lookups, caplog):
    tokenfusion.create_model(CROSSVIT, depth=((1, 1, 0),))
    tokenfusion.create_model("token_fusion_late", **WITH_CNN, pretrained_cnn=False)
    for options in ({}, {"pretrained_cnn": True}):
        with torch.device("meta"):
            assert tokenfusion.create_model("token_fusion_late", **WITH_CNN, **options).head.weight.is_meta
        assert timm.create_model("token_fusion_late", device="meta", **WITH_CNN, **options).head.weight.is_meta
    assert tokenfusion.create_model(CROSSVIT, pretrained=True, device="meta").norm[0].weight.is_meta
    assert lookups == [] and not caplog.records


def test_weights_in_a_file_need_no_hub(lookups, tmp_path):
    path, weights = tmp_path / "weights.safetensors", tokenfusion.create_model(CROSSVIT).state_dict()
    save_file(weights, path)
    model = tokenfusion.create_model(CROSSVIT, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(model.norm[0].weight, weights["norm.0.weight"])
    assert lookups == []


def test_a_hub_that_does_not_answer_is_left_alone(monkeypatch):
    monkeypatch.setattr(hub, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached" in hub._why_not(constants.ENDPOINT)
    assert "cannot be reached" in hub._why_not(constants.ENDPOINT)  # nobody listens any more


def test_the_setting_of_the_hub_is_given_back(lookups):
    with pytest.raises(hub.Unavailable), hub.asked_once("a model", HUB):
        assert constants.HF_HUB_OFFLINE
        raise FileNotFoundError
    assert not constants.HF_HUB_OFFLINE
