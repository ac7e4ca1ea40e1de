"""Fused modules in compiled models: one graph, and changes after compiling count as they do for the plain model."""

import pytest
import torch

import tokenfusion
from tests.surgery import changes
from tests.surgery.subjects import SUBJECTS, Subject

every_subject = pytest.mark.parametrize("kind", SUBJECTS)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(subject: Subject, fuses: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and its compiled form, which has run."""
    model = subject.model()
    if fuses:
        tokenfusion.fuse(model, strict=True)
    runs = torch.compile(model, fullgraph=True, backend="eager")
    runs(subject.inputs())
    return model, runs


def result(model: torch.nn.Module, subject: Subject) -> torch.Tensor | Exception:
    torch.manual_seed(0)
    try:
        return model(subject.inputs()).detach()
    except Exception as error:  # noqa: BLE001  (the other model has to raise, too)
        return error


@every_subject
def test_one_graph(kind):
    subject = SUBJECTS[kind]
    plain, (_, runs) = subject.model(), compiled(subject, fuses=True)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(runs(subject.inputs()), plain(subject.inputs()), rtol=1e-5, atol=1e-5)


CHANGES = {
    name: changes.CHANGES[name]
    for name in ("AlphaDropout", "LoRA", "forward on the instance", "dropout", "heads", "own attention")
}
CHANGES["weights of another model"] = changes.CHANGES["strided state"]
CASES = [
    pytest.param(kind, change, part, id=", ".join(filter(None, (kind, name, part))))
    for kind, subject in SUBJECTS.items()
    for name, change in CHANGES.items()
    for part in change.parts(subject)[-1:]
]


@pytest.mark.parametrize("kind, change, part", CASES)
def test_a_change_after_compiling(kind, change, part):
    """The compiled model sees it, as the plain one does that nobody compiled."""
    subject, results = SUBJECTS[kind], []
    plain, (fused, runs) = subject.model(), compiled(subject, fuses=True)
    for model, called in ((plain, plain), (fused, runs)):
        change.apply(model, part, None)
        results.append(result(called, subject))
    expected, got = results
    assert change.may_fail or not isinstance(expected, Exception), expected
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), f"a result, and the plain model raises {expected!r}"
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_subject
def test_hooks_after_compiling(kind):
    """They are seen by neither the plain nor the fused compiled model, or by both."""
    subject = SUBJECTS[kind]
    results = []
    for fuses in (False, True):
        model, runs = compiled(subject, fuses)
        changes.forward_hook(model, f"module.{(*subject.weighted, subject.norm)[0]}", None)
        results.append(result(runs, subject))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "part", ["blocks.0.0", "blocks.0.0.mlp", "blocks.0", "fusion.0", "fusion.0.0", "fusion.0.0.attn"]
)
@pytest.mark.parametrize("fused_first", [True, False])
def test_a_part_that_is_compiled_by_itself(part, fused_first):
    """It runs as it was compiled, and is not read past."""
    subject, results = SUBJECTS["CrossViT stage"], []
    for fuses in (False, True):
        torch.compiler.reset()
        model = subject.model()
        for step in (True, False):
            if step is not fused_first:
                model.module.get_submodule(part).compile(backend=_larger)
            elif fuses:
                tokenfusion.fuse(model)
        with torch.no_grad():
            results.append(model(subject.inputs()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def _larger(graph, inputs):
    """A backend with a fault."""
    return lambda *args: [1.5 * out for out in graph(*args)]
