"""Choosing a backend."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

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


def runs_on_cpu(call=single_query_attention) -> bool:
    with dispatch.observe() as seen:
        call(*INPUTS)
    return ("single_query_attention", "cpu") in seen.ran


@pytest.fixture(params=["eager", "compiled", "compiled by AOTAutograd"])
def operator(request):
    """single_query_attention, run before under "auto"."""
    if request.param == "eager":
        return single_query_attention
    torch.compiler.reset()
    backend = "eager" if request.param == "compiled" else "aot_eager"
    compiled = torch.compile(single_query_attention, fullgraph=True, backend=backend)
    compiled(*INPUTS)
    return compiled


def test_a_thread_has_its_own_choice(operator):
    in_block, checked = threading.Event(), threading.Event()
    seen = {}

    def other():
        seen["at first"] = runs_on_cpu(operator)
        with tokenfusion.backend("reference"):
            seen["in its block"] = runs_on_cpu(operator)
            in_block.set()
            checked.wait(60)
        seen["after it"] = runs_on_cpu(operator)

    with tokenfusion.backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert in_block.wait(60)
        assert not runs_on_cpu(operator)
    assert runs_on_cpu(operator)
    checked.set()
    thread.join()
    assert seen == {"at first": True, "in its block": False, "after it": True}


def test_a_task_has_its_own_choice(operator):
    async def with_reference(entered, left):
        with tokenfusion.backend("reference"):
            entered.set()
            await left.wait()
            return runs_on_cpu(operator)

    async def beside(entered, left):
        await entered.wait()
        ran = runs_on_cpu(operator)
        left.set()
        return ran

    async def both():
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(with_reference(*events), beside(*events))

    assert asyncio.run(both()) == [False, True]


def test_the_choice_of_the_process_reaches_threads(operator):
    tokenfusion.set_backend("reference")
    try:
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(runs_on_cpu, operator).result()
            with tokenfusion.backend("cpu"):
                assert runs_on_cpu(operator)
    finally:
        tokenfusion.set_backend("auto")
    assert runs_on_cpu(operator)


def test_a_choice_within_compiled_code():
    def call(query, tokens):
        with tokenfusion.backend("reference"):
            return single_query_attention(query, tokens)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert not runs_on_cpu(compiled)
    with tokenfusion.backend("cpu"):
        assert not runs_on_cpu(compiled)
    assert runs_on_cpu()


def test_backends_says_what_runs_and_why_not():
    reasons = tokenfusion.backends()
    assert tuple(reasons) == dispatch.BACKENDS
    assert reasons["reference"] is None
    assert reasons["cpu"] is None
    if not torch.cuda.is_available():
        assert "not built" in reasons["cuda"] or "device" in reasons["cuda"]


TOO_NARROW = "C = 12 is not a multiple of 8 up to 4096"


def test_a_fall_back_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    narrow = [t[..., :12] for t in INPUTS]
    with caplog.at_level(logging.INFO, logger="tokenfusion"):
        single_query_attention(*narrow)
        single_query_attention(*narrow)
    assert [r.message for r in caplog.records] == [
        f"single_query_attention runs on reference; not on cpu: {TOO_NARROW}"
    ]


def test_environment_variable(run_python):
    program = "from tokenfusion.kernels import dispatch; print(dispatch.get_backend())"
    assert run_python(program, TOKENFUSION_BACKEND="reference").strip() == "reference"
    assert run_python(program, TOKENFUSION_BACKEND="").strip() == "auto"
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


@pytest.fixture(params=["eager", "compiled"])
def trainable(request):
    compiled = torch.compile(single_query_attention, fullgraph=True, backend="aot_eager")
    return {"eager": single_query_attention, "compiled": compiled}[request.param]


def test_an_observer_sees_kernels_in_compiled_code_and_backward_passes(trainable):
    query, tokens = (t.clone().requires_grad_() for t in INPUTS)
    trainable(query, tokens)
    with dispatch.observe() as seen:
        trainable(query, tokens).sum().backward()
    assert seen.ran == [("single_query_attention", "cpu"), ("single_query_attention_backward", "cpu")]


def test_an_observer_sees_choices_and_why_the_others_were_none():
    with dispatch.observe() as seen:
        single_query_attention(*INPUTS)
        single_query_attention(*(t[..., :12] for t in INPUTS))
    single_query_attention(*INPUTS)
    assert [(choice.operator, choice.backend) for choice in seen.choices] == [
        ("single_query_attention", "cpu"),
        ("single_query_attention", "reference"),
    ]
    assert [choice.why_not["cpu"] for choice in seen.choices] == [None, TOO_NARROW]
    assert seen.ran == [("single_query_attention", "cpu")]


def test_an_observer_does_not_compile_anything_again():
    torch.compiler.reset()
    compiled = torch.compile(single_query_attention, fullgraph=True, backend="eager")
    compiled(*INPUTS)
    with torch.compiler.set_stance("fail_on_recompile"), dispatch.observe() as seen:
        compiled(*INPUTS)
    assert seen.ran == [("single_query_attention", "cpu")]


def test_an_observer_sees_its_own_task_alone():
    with ThreadPoolExecutor(1) as pool, dispatch.observe() as seen:
        single_query_attention(*INPUTS)
        pool.submit(single_query_attention, *INPUTS).result()
    assert len(seen.choices) == 1 and len(seen.ran) == 1
