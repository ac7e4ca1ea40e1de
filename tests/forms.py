"""How a test has operators run in one of their forms, and sees that they did."""

import contextlib

from tokenfusion.kernels import choices, dispatch
from tokenfusion.kernels.choices import Table, Workload


class _Always(Table):
    """Chooses one implementation for every call."""

    def __init__(self, name: str):
        super().__init__({Workload("", (), ()): name})
        self._name = name

    def choice(self, workload: Workload) -> str:
        return self._name


@contextlib.contextmanager
def forced(name: str):
    """The with-block runs each call of an operator by this implementation, "cpu:library" for one, where it has it and
    it can run; and there is at least one such call."""
    with choices.using(_Always(name)), dispatch.observe() as seen:
        yield seen
    chosen = {choice.name for choice in seen.choices}
    assert name in chosen, f"ran {sorted(chosen)}, expected {name}"
