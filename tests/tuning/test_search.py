"""tune and verify: a wrong kernel is refused and named, a slow one is not chosen, and what was found is kept."""

import dataclasses
import json
import time

import pytest
import timm
import torch

import tokenfusion
from tokenfusion.kernels import choices, dispatch
from tokenfusion.kernels.choices import Workload
from tokenfusion.kernels.dispatch import OPERATORS, Implementation
from tokenfusion.tuning import files, search, tune, verify

INFERENCE = Workload("single_query_attention", ("float32", "inference"), (2, 40, 32, 3))
TRAINING = Workload("single_query_attention", ("float32", "training", "tokens with a gradient"), (2, 40, 32, 3))
TIED = Workload("tied_ffn", ("float32", "training"), (40, 16, 32))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(search, "_SECONDS", 0.05)


@pytest.fixture
def with_implementation(monkeypatch):
    """Puts one more implementation before the others of an operator."""

    def add(operator: str, run, **options) -> None:
        old = OPERATORS[operator]
        new = Implementation("cpu", run, lambda *tensors: None, form="mine", **options)
        changed = dataclasses.replace(old, implementations=(new, *old.implementations))
        monkeypatch.setitem(OPERATORS, operator, changed)

    return add


def reference(*operands):
    return OPERATORS["single_query_attention"].implementations[-1].run(*operands)


def one_lane_wrong(*operands):
    out = reference(*operands)
    return out + torch.nn.functional.one_hot(torch.tensor(5), out.shape[-1]) * 1e-3


def nan(*operands):
    return reference(*operands) * torch.nan


def race(*operands):
    return reference(*operands) * (1 + 1e-5 * torch.rand(1))


def raises(*operands):
    raise RuntimeError("no such instruction")


def beyond_the_end(query, tokens, *others):
    out = reference(query, tokens, *others)
    tokens.detach().as_strided((1,), (1,), tokens.storage_offset() + tokens.numel()).zero_()
    return out


def wrong_gradient(query, *others):
    return reference(query + 1e-3 * (query - query.detach()), *others)


@pytest.mark.parametrize(
    "broken, workload, reason",
    [
        (one_lane_wrong, INFERENCE, "relative error"),
        (nan, INFERENCE, "relative error"),
        (race, INFERENCE, "other bits"),
        (raises, INFERENCE, "no such instruction"),
        (beyond_the_end, INFERENCE, "writes outside"),
        (wrong_gradient, TRAINING, "relative error"),
    ],
)
def test_a_wrong_kernel_is_refused_named_and_never_chosen(with_implementation, tmp_path, broken, workload, reason):
    with_implementation("single_query_attention", broken)
    path = tmp_path / "tuning.json"
    (finding,) = tune(workloads=[workload], path=path).wrong
    assert list(finding.wrong) == ["cpu:mine"] and reason in finding.wrong["cpu:mine"]
    assert finding.choice != "cpu:mine" and "cpu:mine" not in finding.seconds
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["wrong"].keys() == {"cpu:mine"} and entry["choice"] == finding.choice
    (proof,) = verify([workload]).wrong
    assert proof.wrong.keys() == {"cpu:mine"}


def test_a_slow_form_is_not_chosen_and_a_fast_one_is(with_implementation, tmp_path):
    def slow(*operands):
        time.sleep(0.002)
        return reference(*operands)

    with_implementation("single_query_attention", slow)
    (finding,) = tune(workloads=[INFERENCE], path=tmp_path / "tuning.json").findings
    assert finding.choice != "cpu:mine" and finding.seconds["cpu:mine"] > finding.seconds[finding.choice]
    assert not finding.wrong


def test_what_is_chosen_runs(tmp_path):
    path = tmp_path / "tuning.json"
    (finding,) = tune(workloads=[INFERENCE], path=path).findings
    table = files.table_of(files.read(path))
    with choices.using(table), dispatch.observe() as seen:
        tokens = torch.randn(2, 40, 32)
        tokenfusion.kernels.single_query_attention(tokens[:, :3], tokens)
    assert [choice.name for choice in seen.choices] == [finding.choice]


def test_every_form_is_measured(tmp_path):
    (finding,) = tune(workloads=[TIED], path=tmp_path / "tuning.json").findings
    assert {"cpu", "cpu:hold", "reference"} <= set(finding.seconds)
    assert finding.built_in == "cpu" and finding.gain >= 1


def test_an_interruption_keeps_what_was_measured(tmp_path):
    path = tmp_path / "tuning.json"
    tune(workloads=[TIED], path=path)

    def interrupt(finding, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(workloads=[INFERENCE, TRAINING], path=path, report=interrupt)
    assert {files.workload_of(entry) for entry in files.read(path)} == {TIED, INFERENCE}


def test_it_stops_in_time(with_implementation, tmp_path):
    """Between two calls, of a proof or of the timing, whose workload is not finished then."""
    calls = 0

    def counted(*operands):
        nonlocal calls
        calls += 1
        time.sleep(0.2)
        return reference(*operands)

    path = tmp_path / "tuning.json"
    assert tune(workloads=[INFERENCE, TIED], path=path, minutes=0).findings == ()
    with_implementation("single_query_attention", counted)
    start = time.monotonic()
    assert tune(workloads=[INFERENCE, TIED], path=path, minutes=0.5 / 60).findings == ()
    assert time.monotonic() - start < 5 and 2 <= calls < 5
    assert files.read(path) == []


def test_two_at_once_keep_what_both_have_found(tmp_path):
    path = tmp_path / "tuning.json"

    def other_process(finding, done, total):
        if done == 1:
            tune(workloads=[TIED], path=path)

    tune(workloads=[INFERENCE, TRAINING], path=path, report=other_process)
    assert {files.workload_of(entry) for entry in files.read(path)} == {INFERENCE, TRAINING, TIED}


def test_what_the_file_lacks_comes_first(tmp_path):
    path, seen = tmp_path / "tuning.json", []
    tune(workloads=[INFERENCE], path=path)
    tune(workloads=[INFERENCE, TIED], path=path, report=lambda finding, done, total: seen.append(finding.workload))
    assert seen == [TIED, INFERENCE]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), ("cpu", torch.float32)])
def test_what_does_not_fit_memory_is_left_out_and_the_rest_is_measured(monkeypatch, tmp_path, error, backend, dtype):
    """Whether the exact result does not, or a kernel, which is no fault of it."""
    operator = OPERATORS["single_query_attention"]

    def hungry(implementation):
        def run(query, *others):
            if implementation.backend == backend and query.dtype == dtype:
                raise error
            return implementation.run(query, *others)

        return dataclasses.replace(implementation, run=run)

    path = tmp_path / "tuning.json"
    with monkeypatch.context() as patched:
        changed = dataclasses.replace(operator, implementations=tuple(map(hungry, operator.implementations)))
        patched.setitem(OPERATORS, "single_query_attention", changed)
        skipped, measured = tune(workloads=[INFERENCE, TIED], path=path).findings
        (proof,) = verify([INFERENCE]).findings
    assert "ran out of memory" in skipped.skipped and "ran out of memory" in proof.skipped
    assert skipped.choice is None and skipped.wrong == {} and measured.choice is not None
    entries = {files.workload_of(entry): entry for entry in files.read(path)}
    assert "ran out of memory" in entries[INFERENCE]["skipped"] and entries[TIED]["choice"] == measured.choice
    table = files.table_of(files.read(path))
    assert table.choice(INFERENCE) is None and not table.refused


def test_other_errors_of_the_reference_are_not_hidden(monkeypatch, tmp_path):
    operator = OPERATORS["single_query_attention"]
    broken = dataclasses.replace(operator.implementations[-1], run=raises)
    changed = dataclasses.replace(operator, implementations=(*operator.implementations[:-1], broken))
    monkeypatch.setitem(OPERATORS, "single_query_attention", changed)
    with pytest.raises(RuntimeError, match="no such instruction"):
        tune(workloads=[INFERENCE], path=tmp_path / "tuning.json")


def test_what_is_hopeless_is_not_timed_any_longer(with_implementation, tmp_path):
    calls = 0

    def slow(*operands):
        nonlocal calls
        calls += 1
        time.sleep(0.01)
        return reference(*operands)

    with_implementation("single_query_attention", slow)
    (finding,) = tune(workloads=[INFERENCE], path=tmp_path / "tuning.json").findings
    assert calls == 5 and finding.seconds["cpu:mine"] > 0.01  # two of the proof, one to warm up, two rounds


def test_a_path_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        tune(workloads=[INFERENCE], path=tmp_path / "file" / "tuning.json", report=pytest.fail)


@pytest.mark.parametrize("minutes", [-1.0, float("nan")])
def test_a_time_that_is_none_is_refused(minutes, tmp_path):
    with pytest.raises(ValueError, match="minutes: got"):
        tune(workloads=[INFERENCE], minutes=minutes, path=tmp_path / "tuning.json")


def test_a_model_stays_as_it_is():
    """Its statistics, the modes of its parts, and the random numbers of whoever asks."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    model[1].eval()
    x, state = torch.randn(8, 4), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert search.workloads_of(model, (x,), trains=True) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model[0].training and not model[1].training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_calls_of_a_model(tmp_path):
    model = timm.create_model("crossvit_9_240")
    tokenfusion.fuse(model)
    images = torch.randn(2, 3, 240, 240)
    workloads = search.workloads_of(model, (images,), trains=True)
    assert {workload.operator for workload in workloads} == {"single_query_attention", "linear"}
    assert {workload.kind[1] for workload in workloads if workload.operator == "linear"} == {"inference"}
    attention = [workload for workload in workloads if workload.operator == "single_query_attention"]
    assert {workload.kind[1] for workload in attention} == {"inference", "training"}
    assert {workload.sizes for workload in attention} == {(2, 196, 256, 4), (2, 400, 128, 4)}
    assert model.training
    found = tokenfusion.tune(model, (images[:1],), train=False, path=tmp_path / "tuning.json")
    assert {finding.workload.kind[1] for finding in found.findings} == {"inference"}
