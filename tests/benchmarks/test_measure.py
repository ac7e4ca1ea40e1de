"""How a problem is measured: what is checked first, what is timed, and on which inputs."""

import contextlib

import torch

from benchmarks.measure import harness, problem, timing
from benchmarks.measure.problem import Problem, Variant
from benchmarks.report.table import AUTOTUNED, COMPILED
from tokenfusion.tuning.parity import compare


def test_inputs_of_a_case_are_capped_where_a_virtual_machine_reports_a_large_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda: 480 << 20)
    made = []

    def make():
        made.append(torch.empty(16 << 20, dtype=torch.uint8))
        return made[-1:]

    timing.Ring(make)
    assert len(made) == 16  # 256 MiB
    assert timing.policy() == "inputs rotate through 256 MiB (the machine reports a last-level cache of 480 MiB)"
    monkeypatch.setattr(timing, "cache_bytes", lambda: 32 << 20)
    assert len(timing.Ring(make)) == 6
    assert timing.policy() == "inputs rotate through 3 x the last-level cache (32 MiB)"


class _Entry:
    """Stands in for a variant on a GPU."""

    def __init__(self, seconds: float, sets: int, can_be_captured: bool = True):
        self.seconds, self.ring, self.can_be_captured, self.replay = seconds, range(sets), can_be_captured, None

    def from_python(self, calls: int) -> float:
        return self.seconds

    def capture(self, calls: int) -> None:
        if not self.can_be_captured:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.replay = calls


def test_on_a_gpu_a_sample_takes_no_set_of_inputs_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entries = [_Entry(1e-5, sets=7), _Entry(1e-4, sets=90)]
    calls, rounds = harness._plan(entries, harness.Effort(1, 3, 50))
    assert (calls, rounds) == (7, 50)
    assert harness._capture(entries, calls) == {} and [entry.replay for entry in entries] == [7, 7]


def test_where_one_variant_cannot_be_captured_none_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entries = [_Entry(1e-5, 7), _Entry(1e-5, 7, can_be_captured=False)]
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert harness._capture(entries, 3) == {"not_captured": reason}
    assert [entry.replay for entry in entries] == [None, None]


def _doubling(*variants: Variant) -> Problem:
    return Problem(
        group="doubling",
        case={"N": 3, "dtype": "float32"},
        variants=[Variant("eager", lambda x: (2 * x,)), *variants],
        make_inputs=lambda: (torch.randn(1 << 20),),
        reference=lambda x: (2 * x,),
        moved=8 << 20,
        written=True,
        flops=1 << 20,
    )


def test_variants_with_a_fault_are_not_timed():
    def fails(x):
        raise RuntimeError("no such luck\nsecond line")

    problem = _doubling(
        Variant("wrong", lambda x: (2.001 * x,)),
        Variant("not a number", lambda x: (x / 0,)),
        Variant("fails", fails),
        Variant("not of this package", lambda x: (2 * x,), backend="cpu"),
        Variant("tokenfusion (reference)", lambda x: (2 * x,), backend="reference"),
    )
    measured = harness.run(problem, harness.Effort(0.01, 3, 3))
    rows = {row["variant"]: row for row in measured.rows}
    assert {name for name, row in rows.items() if "seconds" in row} == {"eager", "tokenfusion (reference)"}
    assert measured.samples.keys() == {"eager", "tokenfusion (reference)"}
    assert [len(samples) for samples in measured.samples.values()] == [3, 3]
    assert "allowed" in rows["wrong"]["fault"]
    assert "allowed" in rows["not a number"]["fault"]
    assert rows["not a number"]["error"] is None  # JSON knows no NaN
    assert rows["fails"]["fault"] == "RuntimeError: no such luck"
    assert rows["not of this package"]["fault"] == "expected backend cpu, ran plain PyTorch"


def test_all_variants_are_timed_once_more_with_freed_memory_kept(monkeypatch):
    states = []

    @contextlib.contextmanager
    def keeping():
        states.append("kept")
        yield
        states.append("as before")

    monkeypatch.setattr(harness.allocator, "keeping_freed_memory", keeping)
    problem = _doubling(Variant("other", lambda x: (states.append("called"), 2 * x)[1:]))
    rows = harness.run(problem, harness.Effort(0.01, 3, 3), kept=True).rows
    assert [row["rounds"] for row in rows] == [3, 3]
    assert all(row["kept_seconds"] > 0 and row["kept_times_compiled"] is None for row in rows)
    assert rows[0]["kept_times_eager"] == 1 and rows[1]["kept_times_eager"] > 0
    kept = states[states.index("kept") : states.index("as before")]
    assert kept.count("called") >= 1 + 3 and states[-1] == "as before"  # to warm up, and each round
    assert "kept_seconds" not in harness.run(problem, harness.Effort(0.01, 3, 3)).rows[0]


def test_parity_takes_a_zero_gradient_for_what_it_is():
    exact = (torch.ones(4, dtype=torch.float64), torch.full((4,), 1e-18, dtype=torch.float64))
    eager = (torch.ones(4), torch.full((4,), 1e-9))
    assert compare((torch.ones(4), torch.full((4,), 3e-9)), eager, exact).passes
    assert not compare((torch.ones(4), torch.full((4,), 3e-6)), eager, exact).passes


def test_a_compiler_that_tunes_stands_beside_the_one_that_does_not_where_that_is_asked_for():
    found = problem.variants(problem.forward, torch.sin, torch.sin, ["cuda"], compiles=("eager", "autotuned"))
    assert [variant.name for variant in found] == ["eager", COMPILED, AUTOTUNED, "tokenfusion (cuda)"]


def test_a_kernel_can_be_left_out(monkeypatch):
    x, weight = torch.ones(1, 4, 3, 3), torch.ones(4, 4, 2, 2)
    everything = problem.backends_for("upconv_concat", x, weight)
    monkeypatch.setattr(problem, "without", {("upconv", everything[0])})
    assert problem.backends_for("upconv_concat", x, weight) == everything[1:]
    monkeypatch.setattr(problem, "without", {("tied_ffn", everything[0])})
    assert problem.backends_for("upconv_concat", x, weight) == everything
