"""A fused model stays the same model, whatever is done to it and its parts before and after fusing.

Every kind of module x every change x its order with fuse, beside a plain model that the same is done to.
"""

import copy
import functools
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import tokenfusion
from tests.surgery.changes import CHANGES, Change, calls
from tests.surgery.subjects import SUBJECTS, Subject

ORDERS = ("change, fuse", "fuse, change", "fuse, change, copy")
CASES = [
    pytest.param(subject, change, part, id=", ".join(filter(None, (kind, name, part))))
    for kind, subject in SUBJECTS.items()
    for name, change in CHANGES.items()
    for part in change.parts(subject)
]


def changed(subject: Subject, change: Change, part: str | None, order: str, fuses: bool, undo: ExitStack) -> nn.Module:
    model = subject.model()
    for step in order.split(", "):
        if step == "change":
            model = change.apply(model, part, undo) or model
        elif step == "copy":
            model = copy.deepcopy(model)
        elif fuses:
            tokenfusion.fuse(model)
    return model


def called(model: nn.Module, subject: Subject) -> torch.Tensor:
    torch.manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        return model(subject.inputs().to(dtype))


def trained(model: nn.Module, subject: Subject) -> dict[str, torch.Tensor]:
    """Outputs and gradients of three steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    x = subject.inputs().to(next(model.parameters()).dtype).requires_grad_()
    seen = {}
    torch.manual_seed(0)
    for step in range(3):
        model.zero_grad()
        x.grad = None
        out = model(x)
        generator = torch.Generator().manual_seed(step)
        out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
        seen |= {f"out {step}": out.detach(), f"input {step}": x.grad}
        for name, parameter in model.named_parameters():
            samples = getattr(parameter, "grad_sample", None)
            seen |= {f"{name} {step}": parameter.grad, f"{name} {step} samples": samples}
        if optimizer is not None:
            optimizer.step()
    return {name: value for name, value in seen.items() if value is not None}


def outcome(subject: Subject, change: Change, part: str | None, order: str, fuses: bool) -> dict | Exception:
    """What can be seen of a model from outside; or what it raises."""
    calls.clear()
    with ExitStack() as undo:
        try:
            model = changed(subject, change, part, order, fuses, undo)
            seen = {} if change.inference else trained(model, subject)
            seen["inference"] = called(model, subject)
            seen |= {f"call {i}": value for i, value in enumerate(calls)}
            seen["keys"] = list(model.state_dict())
            if change.unfuses:
                tokenfusion.unfuse(model)
                seen["classes"] = [(name, str(type(module))) for name, module in model.named_modules()]
                seen["unfused"] = called(model, subject)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other model has to raise, too)
            return error
    return seen


def compare(got: dict | Exception, expected: dict | Exception, tolerance: float) -> None:
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), f"a result, and the plain model raises {expected!r}"
        return
    if isinstance(got, Exception):
        raise got
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            close = dict(rtol=tolerance, atol=tolerance * max(1.0, value.float().abs().max().item()))
            assert value.isfinite().all(), name
            torch.testing.assert_close(got[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert got[name] == value, name


@functools.cache
def known(subject: Subject) -> None:
    """Its classes, before a change to one of them."""
    tokenfusion.fuse(subject.model(), strict=True)


@pytest.mark.parametrize("subject, change, part", CASES)
def test_same_as_the_plain_model(subject, change, part, caplog):
    known(subject)
    plain = {}  # by its steps, of which fuse is none
    for order in ORDERS if change.copies else ORDERS[:2]:
        steps = tuple(step for step in order.split(", ") if step != "fuse")
        if steps not in plain:
            plain[steps] = outcome(subject, change, part, order, fuses=False)
        expected = plain[steps]
        assert change.may_fail or not isinstance(expected, Exception), expected
        caplog.clear()
        got = outcome(subject, change, part, order, fuses=True)
        try:
            compare(got, expected, change.tolerance)
        except Exception as error:
            raise AssertionError(f"{order}: {error}") from error
        told = [record.args[0] for record in caplog.records if record.name == "tokenfusion"]
        named = [name for name in told if name != "a module"]  # operations inside a block
        assert len(set(named)) == len(named), f"{order}: {told}"
