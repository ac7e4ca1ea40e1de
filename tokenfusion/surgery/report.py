"""What `fuse` did to each module that it knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleReport:
    """One module that fuse looked at. reason is None when it was replaced, otherwise why it was left alone."""

    name: str
    kind: str
    op: str
    reason: str | None

    @property
    def replaced(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class FuseReport:
    """What `tokenfusion.fuse` did, module by module; printing it gives a line a module."""

    modules: tuple[ModuleReport, ...]

    @property
    def replaced(self) -> tuple[ModuleReport, ...]:
        return tuple(module for module in self.modules if module.replaced)

    @property
    def left(self) -> tuple[ModuleReport, ...]:
        return tuple(module for module in self.modules if not module.replaced)

    def __str__(self) -> str:
        if not self.modules:
            return "fuse: no module of a kind that tokenfusion can replace"
        lines = [f"fuse: {len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        for module in self.modules:
            outcome = f"replaced ({module.op})" if module.replaced else f"left alone: {module.reason}"
            lines.append(f"  {module.name or '(the model itself)'}  {module.kind}  {outcome}")
        return "\n".join(lines)
