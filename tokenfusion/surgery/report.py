"""What `fuse` did to each module that it knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleReport:
    """One module that fuse looked at. reason is None when it was replaced, otherwise why it was left alone; note says
    what else there is to know of one that was replaced."""

    name: str
    kind: str
    op: str
    reason: str | None
    note: str = ""

    @property
    def replaced(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class FuseReport:
    """What `tokenfusion.fuse` did, module by module; printing it gives a line a module. own_layers is the number of
    layers of tokenfusion's own that it met, which have fused forms of their own."""

    modules: tuple[ModuleReport, ...]
    own_layers: int = 0

    @property
    def replaced(self) -> tuple[ModuleReport, ...]:
        return tuple(module for module in self.modules if module.replaced)

    @property
    def left(self) -> tuple[ModuleReport, ...]:
        return tuple(module for module in self.modules if not module.replaced)

    def __str__(self) -> str:
        if not self.modules and self.own_layers:
            return (
                f"fuse: nothing to replace: tokenfusion's own layers ({self.own_layers}) have fused forms of their own"
            )
        if not self.modules:
            return "fuse: no module of a kind that tokenfusion can replace"
        lines = [f"fuse: {len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        for module in self.modules:
            outcome = f"replaced ({module.op})" if module.replaced else f"left alone: {module.reason}"
            note = f", {module.note}" if module.replaced and module.note else ""
            lines.append(f"  {module.name or '(the model itself)'}  {module.kind}  {outcome}{note}")
        return "\n".join(lines)


@dataclass(frozen=True)
class MatrixReport:
    """One matrix that tie_weights replaced. error is that of its rebuilt form, relative to its Frobenius norm."""

    name: str
    kind: str
    error: float


@dataclass(frozen=True)
class UntiedReport:
    """A module of a known kind that tie_weights left alone, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class TieReport:
    """What `tokenfusion.tie_weights` did; printing it gives a line a matrix."""

    matrices: tuple[MatrixReport, ...]
    left: tuple[UntiedReport, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        if not self.matrices and not self.left:
            return "tie_weights: no module of a kind that tokenfusion can tie; the model is unchanged"
        before, after = self.parameters_before, self.parameters_after
        lines = [f"tie_weights: {len(self.matrices)} matrices tied; {before:,} parameters before, {after:,} after"]
        lines += [f"  {m.name}  {m.kind}  relative error {m.error:.3f}" for m in self.matrices]
        lines += [f"  {module.name}  {module.kind}  left alone: {module.reason}" for module in self.left]
        return "\n".join(lines)
