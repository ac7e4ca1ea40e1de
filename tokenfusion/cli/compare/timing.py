"""The four forms of a model that `tokenfusion compare` sets beside each other, timed in turn."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tokenfusion import measure
from tokenfusion.cli.errors import first_line

AND_COMPILE = "+ compile"
EAGER = "eager"
COMPILED = f"{EAGER} {AND_COMPILE}"
FUSED = "tokenfusion"
FUSED_COMPILED = f"{FUSED} {AND_COMPILE}"
THAT_COMPILE = (COMPILED, FUSED_COMPILED)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round and of the first call, which compiles, and peak bytes; or why the variant cannot run."""

    seconds: list[float] | None = None
    peak_extra_bytes: int | None = None
    first_call_seconds: float | None = None
    unavailable: str | None = None


class Calls(nn.Module):
    """Some of a model's modules, each called as it was in a forward pass of the model."""

    def __init__(self, model: nn.Module, calls: Iterable[tuple[str, tuple, dict]]):
        super().__init__()
        self.called = nn.ModuleList(model.get_submodule(name) for name, _, _ in calls)

    def forward(self, arguments: list[tuple[tuple, dict]]) -> list:
        return [module(*args, **kwargs) for module, (args, kwargs) in zip(self.called, arguments, strict=True)]


def recorded_calls(model: nn.Module, names: Iterable[str], inputs: torch.Tensor) -> list[tuple[str, tuple, dict]]:
    """(name, args, kwargs) of every call of the named modules in one forward pass, in order."""
    calls = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, args, kwargs)), with_kwargs=True
        )
        for name in names
    ]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def innermost(names: Iterable[str]) -> list[str]:
    """The modules with no other of them inside, so that no work is counted twice."""
    names = list(names)
    return [name for name in names if not any(other != name and _contains(name, other) for other in names)]


def _contains(name: str, other: str) -> bool:
    return name == "" or other.startswith(f"{name}.")


def time_variants(
    modules: Mapping[str, nn.Module], inputs: object, *, rounds: int, device: str, step: Callable[..., None]
) -> dict[str, Timing]:
    """Time and peak memory of every variant called with `inputs`.

    step(description) names the stage, and step(advance=1) comes rounds + 3 times a variant that runs.
    """
    calls = {name: lambda module=module: module(inputs) for name, module in modules.items()}
    first_calls: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        step(f"compiling {name}" if name in THAT_COMPILE else f"first call of {name}")
        try:
            first_calls[name] = _seconds(call)
        except Exception as error:
            if name not in THAT_COMPILE:
                raise
            failures[name] = first_line(error)  # without a compiler, or on a model that torch.compile cannot take
        step(advance=1)

    step("timing, in turn")
    running = {name: call for name, call in calls.items() if name not in failures}
    seconds = measure.interleaved_seconds(running, rounds=rounds, after_each=lambda: step(advance=1))
    timings = {name: Timing(unavailable=reason) for name, reason in failures.items()}
    for name, call in running.items():
        step(f"memory of {name}")
        timings[name] = Timing(seconds[name], measure.peak_extra_bytes(call, device=device), first_calls[name])
        step(advance=1)
    return {name: timings[name] for name in modules}


def variants(eager: nn.Module, fused: nn.Module | None, *, compile: bool) -> dict[str, nn.Module]:
    """Variant -> module, those that were asked for."""
    chosen = {EAGER: (eager, False), COMPILED: (eager, True), FUSED: (fused, False), FUSED_COMPILED: (fused, True)}
    return {
        name: torch.compile(module, dynamic=False) if compiled else module
        for name, (module, compiled) in chosen.items()
        if module is not None and (compile or not compiled)
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    measure.synchronize()
    return time.perf_counter() - start
