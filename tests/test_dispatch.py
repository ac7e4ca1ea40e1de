"""Choosing a backend."""

import logging

import pytest
import torch

import tokenfusion
from tests.parity import assert_runs
from tokenfusion.kernels import dispatch, single_query_attention

INPUTS = torch.randn(2, 3, 16), torch.randn(2, 5, 16)


def test_unknown_name_is_refused_and_nothing_changes():
    before = dispatch.get_backend()
    with pytest.raises(ValueError, match="'gpu'.*'auto', 'reference', 'cpu', 'triton', 'cuda'"):
        tokenfusion.set_backend("gpu")
    assert dispatch.get_backend() == before


def test_context_manager_restores_the_choice_after_an_error():
    before = dispatch.get_backend()
    with pytest.raises(KeyError), tokenfusion.backend("reference"):
        assert dispatch.get_backend() == "reference"
        raise KeyError
    assert dispatch.get_backend() == before


def test_auto_takes_the_cpu_kernels_and_a_name_what_it_says():
    with assert_runs("single_query_attention_cpu"):
        single_query_attention(*INPUTS)
    with tokenfusion.backend("reference"), assert_runs():
        single_query_attention(*INPUTS)


def test_backends_says_what_runs_and_why_not():
    reasons = tokenfusion.backends()
    assert tuple(reasons) == dispatch.BACKENDS
    assert reasons["reference"] is None
    assert reasons["cpu"] is None
    if not torch.cuda.is_available():
        assert "not built" in reasons["cuda"] or "device" in reasons["cuda"]


def test_a_fall_back_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    halves = [t.half() for t in INPUTS]
    with caplog.at_level(logging.INFO, logger="tokenfusion"):
        single_query_attention(*halves)
        single_query_attention(*halves)
    assert [r.message for r in caplog.records] == [
        "single_query_attention runs on reference; not on cpu: dtype torch.float16 is not supported"
    ]


def test_environment_variable(run_python):
    program = "from tokenfusion.kernels import dispatch; print(dispatch.get_backend())"
    assert run_python(program, TOKENFUSION_BACKEND="reference").strip() == "reference"
    with pytest.raises(AssertionError, match="TOKENFUSION_BACKEND.*'gpu'"):
        run_python(program, TOKENFUSION_BACKEND="gpu")


def test_import_is_light(run_python):
    """Neither triton nor timm nor a compiler is touched before something asks for it."""
    run_python(
        """
        import sys, tokenfusion
        assert not any(name.endswith(("triton_kernels", "triton_host")) for name in sys.modules)
        assert "timm" not in sys.modules
        """
    )
