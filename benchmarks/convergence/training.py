"""Training the same model in several ways, step by step in turn, and how far each ends from the first."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LinearLR

import tokenfusion
from benchmarks.convergence.families import HELD_OUT, Family, digits
from benchmarks.measure.problem import device
from tokenfusion import measure
from tokenfusion.kernels import dispatch

BATCH = 32
WARM_UP = 20  # steps in which the learning rate grows, without which rounding decides where a training goes
_FIRST = 10  # steps whose times do not count


@dataclass(frozen=True)
class Way:
    """How a step is computed. Neither fused nor compiled, it differs from the first in the order of sums alone."""

    name: str
    fused: bool = False
    compiled: bool = False
    threads: int | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    reversed: bool = False  # the images of a batch


WAYS = [
    Way("eager"),
    Way("eager, 1 thread", threads=1),
    Way("eager, channels_last", memory_format=torch.channels_last),
    Way("eager, batches reversed", reversed=True),
    Way("compile", compiled=True),
    Way("fused", fused=True),
    Way("fused + compile", fused=True, compiled=True),
]


@dataclass
class Run:
    """A model that is trained in one way; backend is that of the operators where it is fused."""

    way: Way
    family: Family
    bfloat16: bool
    backend: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)  # operators of this package that ran in the second step

    def __post_init__(self):
        self.model = self.family.make().to(device(), memory_format=self.way.memory_format)
        self.before = self._parameters()
        if self.way.fused:
            tokenfusion.fuse(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.family.rate)
        self.schedule = LinearLR(self.optimizer, start_factor=1 / WARM_UP, total_iters=WARM_UP)
        self._forward = torch.compile(self.model, dynamic=False) if self.way.compiled else self.model

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.way.reversed:
            images, labels = images.flip(0), labels.flip(0)
        images = images.contiguous(memory_format=self.way.memory_format)
        torch.manual_seed(len(self.losses))  # of dropout and drop path
        with self._settings():
            start = time.perf_counter()
            with self._autocast():
                logits = self._forward(images)
            loss = F.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def peak_bytes(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """Of a further step, which is not one of the run."""
        losses, seconds = len(self.losses), len(self.seconds)
        self.model.train()
        peak = measure.peak_extra_bytes(lambda: self.step(images, labels))
        del self.losses[losses:], self.seconds[seconds:]
        return peak

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        self.model.eval()
        with self._settings(), self._autocast():
            return self.model(images.contiguous(memory_format=self.way.memory_format)).float()

    def moved(self, other: "Run") -> float:
        """The distance of the parameters from those of another run, of the way that these went."""
        now = self._parameters()
        return ((now - other._parameters()).norm() / (now - self.before).norm()).item()

    def _parameters(self) -> torch.Tensor:
        return torch.cat([parameter.detach().double().flatten() for parameter in self.model.parameters()])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(device(), torch.bfloat16, enabled=self.bfloat16)

    @contextlib.contextmanager
    def _settings(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(self.way.threads or threads)
        try:
            with tokenfusion.backend(self.backend if self.way.fused else "reference"):
                yield
        finally:
            torch.set_num_threads(threads)


def compare(
    family: Family, bfloat16: bool, steps: int, backend: str, report: Callable[[str], None] = lambda text: None
) -> list[dict]:
    """A row for every way: its losses, how far it ends from eager, and what a step takes.

    Raises:
        RuntimeError: no kernel of this package ran where the model is fused.
    """
    torch.compiler.reset()
    images, labels = (tensor.to(device()) for tensor in digits(family.size))
    train, targets, held_out = images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT]
    runs = [Run(way, family, bfloat16, backend) for way in WAYS]
    shuffle = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.randint(len(train), (BATCH,), generator=shuffle).to(device())
        for run in random.sample(runs, len(runs)):
            with dispatch.observe() if step == 1 else contextlib.nullcontext() as seen:
                run.step(train[chosen], targets[chosen])
            if seen:
                run.kernels = {operator for operator, _ in seen.ran}
        report(f"{family.name}, step {step + 1} of {steps}")
    logits = {run.way.name: run.logits(held_out) for run in runs}
    eager = runs[0]
    rows = []
    for run in runs:
        if run.way.fused and not run.kernels:
            raise RuntimeError(f"{family.name}, {run.way.name}: no kernel of this package ran")
        found, plain = logits[run.way.name], logits[eager.way.name]
        seconds = statistics.median(run.seconds[min(_FIRST, steps // 2) :])
        rows.append(
            {
                "family": family.name,
                "dtype": "bfloat16" if bfloat16 else "float32",
                "way": run.way.name,
                "fused": run.way.fused,
                "compiled": run.way.compiled,
                "kernels": sorted(run.kernels),
                "losses": [float(f"{loss:.9g}") for loss in run.losses],
                "loss_distance": torch.tensor(run.losses).sub(torch.tensor(eager.losses)).abs().max().item(),
                "logit_distance": ((found - plain).norm() / plain.norm()).item(),
                "parameter_distance": run.moved(eager),
                "accuracy": (found.argmax(dim=1) == labels[:HELD_OUT]).float().mean().item(),
                "images_per_second": BATCH / seconds,
            }
        )
    for run, row in zip(runs, rows, strict=True):
        row["peak_bytes"] = run.peak_bytes(train[:BATCH], targets[:BATCH])
    return rows
