"""benchmarks.gpu_model from counts on: limits, predictions, what is printed, and records beside them."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_model import __main__ as gpu_model
from benchmarks.gpu_model import beside, budgets, facts, issue, limits, machine_code, measured, show
from benchmarks.gpu_model.devices import DEVICES, LIBRARY_SHARE
from benchmarks.gpu_model.facts import Call
from benchmarks.gpu_model.limits import LAUNCH, Launch, Prediction
from benchmarks.gpu_model.machine_code import Instruction, MachineCode

H100 = DEVICES["h100"]
COPY = Launch("copy", read=1.5e9, written=1.5e9)
PRODUCT = Launch(
    "product",
    read=1e6,
    written=1e6,
    blocks=132 * 8,
    warps=8,
    registers=64,
    shared=40 << 10,
    instructions={"fp32": 1e6, "alu": 4e6, "special": 1e6, "shuffle": 2e6, "matrix": 1e5},
    accesses=1e5,
    sectors=4e5,
    through_l2=3e5,
    partial=1e5,
    useful=8e6,
    lines=1e5,
    copied_lines=4e4,
    wavefronts=3e6,
    without_conflicts=2e6,
    flops={"wgmma.mma_async": 1e10},
)


def make_call(direction: str = "forward", product: Launch = PRODUCT) -> Call:
    launches = {80: [product, COPY], 90: [product, COPY]}
    return Call("tied_ffn", "triton", direction, "bfloat16", {"N": 70, "C": 16, "F": 40}, "token", 70, 10**6, launches)


def test_a_copy_takes_as_long_as_copies_do():
    found = limits.limits(COPY, H100)
    assert found.binding == "memory" and found.predicted == pytest.approx(3e9 / H100.copy + LAUNCH)
    whole = Prediction.of([COPY], H100, must_move=3e9)
    assert whole.share == pytest.approx(1, rel=0.01) and whole.seconds == found.predicted


def test_each_resource_by_hand():
    found = limits.limits(PRODUCT, H100)
    clocks = 132 * 1.7e9
    assert (found.blocks_per_multiprocessor, found.waves, found.issue_share) == (4, 2, 0.65)
    expected = {
        "issue": 8.1e6 / (4 * clocks) / 0.65,
        "fp32": 1e6 / 4 / clocks,
        "alu": 4e6 / 2 / clocks,
        "special": 1e6 * 2 / clocks,
        "L1 lookups": 1e5 / clocks,
        "shared memory": (3e6 + 1e5 - 4e4 + 2e6) / clocks,
        "matrix products": 1e10 / (132 * 4096 * 1.7e9),
        "L2": 32 * 4e5 / H100.l2,
        "memory": 2e6 / H100.copy,
    }
    assert found.seconds == pytest.approx(expected)
    assert found.binding == "shared memory" and found.predicted > max(expected.values())


def test_products_that_are_left_to_pytorch():
    left, right, out = torch.zeros(6, 4), torch.zeros(4, 8), torch.empty(6, 8)
    with beside.pytorch_operations() as found:
        torch.addmm(torch.zeros(8), left, right, out=out)
        torch.mm(left, right, out=out)
        torch.mm(left.bfloat16(), right.bfloat16())
    added, plain, *_, half = found
    assert [each.kernel for each in (added, plain, half)] == ["PyTorch's addmm", "PyTorch's mm", "PyTorch's mm"]
    assert (added.read, plain.read, half.read) == (4 * (24 + 32 + 8), 4 * (24 + 32), 2 * (24 + 32))
    assert (added.written, plain.written, half.written) == (4 * 48, 4 * 48, 2 * 48)
    assert added.flops == plain.flops == {"fp32": 2 * 6 * 4 * 8} and list(half.flops) == ["wgmma.mma_async"]
    seconds = limits.limits(replace(added, read=0, written=0), H100).seconds
    assert seconds["matrix products"] == pytest.approx(2 * 6 * 4 * 8 / H100.fp32 / LIBRARY_SHARE)


def test_a_matrix_that_all_products_of_a_batch_share_is_read_once():
    with beside.pytorch_operations() as found:
        torch.bmm(torch.zeros(6, 4).expand(3, 6, 4), torch.zeros(3, 4, 8))
    (product,) = found
    assert (product.read, product.written) == (4 * (24 + 3 * 32), 4 * 3 * 48)
    assert product.flops == {"fp32": 2 * 3 * 6 * 4 * 8}


@pytest.mark.parametrize("blocks, expected", [(132, 1), (133, 2 * 132 / 133), (297, 396 / 297), (66, 2)])
def test_blocks_that_do_not_fill_the_last_wave(blocks, expected):
    assert limits.uneven(blocks, H100) == pytest.approx(expected)


def test_few_warps_cannot_issue_all_the_time():
    shares = [limits.issue_share(warps) for warps in (4, 8, 12, 16, 64)]
    assert shares == pytest.approx([0.222, 0.444, 0.65, 0.65, 0.65], abs=1e-3)


def test_a_block_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="does not fit on a multiprocessor of A100"):
        limits.limits(replace(PRODUCT, shared=200 << 10), DEVICES["a100"])


def line(number: int, opcode: str) -> Instruction:
    return Instruction(number, "", opcode, "R0, R1")


def test_machine_code_runs_as_often_as_its_lines():
    """A beginning, a loop that was unrolled by two with what is left over, and code that is another branch's."""
    step = [line(10, "LDG.E"), line(11, "IADD3"), line(12, "STG.E"), line(13, "LOP3.LUT"), line(13, "SHF.L")]
    blocks = (line(1, "S2R"), line(2, "IMAD")), (*step, *step, line(14, "BRA")), (*step,), (line(20, "MUFU.EX2"),)
    code = MachineCode(32, 0, 0, blocks)
    opcodes = {1: "mov", 2: "mul", 10: "ld.global", 11: "add", 12: "st.global", 13: "shl", 14: "bra", 20: "ex2"}
    lines = {1: 8, 2: 8, 10: 96, 11: 96, 12: 96, 13: 96, 14: 96, 20: 0}
    assert issue.executions(code, lines, opcodes) == [8, 32, 32, 0]
    found = issue.issued(code, lines, opcodes)
    assert found == Counter({"global": 192, "alu": 288, "control": 32, "fp32": 8, "uniform and moves": 8, "special": 0})


def test_a_branch_by_a_table_leads_to_all_its_targets():
    text = """
        /*0000*/ BRX R52 -0x2930 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) ;
    .L_x_1:
        /*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/ EXIT ;
        /*0030*/ FADD R1, R1, R1 ;
    .L_x_2:
        /*0040*/ @P0 BRA `(.L_x_1) ;
        /*0050*/ EXIT ;
    """
    found = machine_code._blocks(re.sub("^ +", "", text, flags=re.MULTILINE))
    assert [each.opcode for block in found for each in block] == ["BRX", "HMMA.16816.F32", "EXIT", "BRA", "EXIT"]


@pytest.mark.parametrize("condition", ["UR4, ", "~URZ, "])  # as for compute capabilities 9.0 and 8.0
def test_where_lanes_do_not_diverge_code_goes_on(condition):
    text = f"""
        /*0000*/ BRA.DIV {condition}`(.L_x_1) ;
        /*0010*/ SHFL.BFLY PT, R1, R2, 0x4, 0x1f ;
        /*0020*/ EXIT ;
    .L_x_1:
        /*0030*/ WARPSYNC.COLLECTIVE R1, `(.L_x_2) ;
        /*0040*/ EXIT ;
    """
    found = machine_code._blocks(re.sub("^ +", "", text, flags=re.MULTILINE))
    assert [each.opcode for block in found for each in block] == ["BRA.DIV", "SHFL.BFLY", "EXIT"]


def test_counts_survive_their_file(tmp_path):
    calls = [make_call(), make_call("backward")]
    facts.save(tmp_path / "counted.json", calls, {"triton": "1.2"})
    assert facts.load(tmp_path / "counted.json") == (calls, {"triton": "1.2"})
    written = json.loads((tmp_path / "counted.json").read_text())["calls"][0]["predictions"]["h100"]
    assert written["seconds"] == pytest.approx(calls[0].on(H100).seconds, rel=1e-4)


def make_record(folder, name: str, rows: list[dict]) -> None:
    device = {"kind": "cuda", "name": name}
    (folder / "gpu.json").write_text(json.dumps({"conditions": {"device": device}, "rows": rows}))


def row(direction: str, seconds: float, **changed) -> dict:
    case = {"N": 70, "C": 16, "F": 40, "dtype": "bfloat16", "direction": direction}
    of_call = {"group": "tied_ffn, the op", "case": case, "backend": "triton", "variant": "tokenfusion (triton)"}
    return of_call | {"seconds": seconds, "fault": None} | changed


def test_a_record_of_a_gpu_stands_beside_the_prediction(tmp_path):
    calls = [make_call(), make_call("backward")]
    forward, backward = (call.on(H100).seconds for call in calls)
    others = [
        row("forward", 1.0, backend=None, variant="eager"),
        row("forward", 1.0, backend="reference"),
        row("forward", 1.0, variant="tokenfusion (triton) + compile"),
        row("forward", 1.0, fault="wrong"),
        row("forward", 1.0, group="another"),
    ]
    rows = [row("forward", 1.5 * forward), row("forward + backward", 0.8 * (forward + backward)), *others]
    make_record(tmp_path, "NVIDIA H100 80GB HBM3", rows)
    found = measured.records(tmp_path)
    errors = [[one.error for one in measured.beside(call, calls, found)] for call in calls]
    assert errors == [[pytest.approx(0.5)], [pytest.approx(-0.2)]]
    printed = show.text(calls[0], [H100], measured.beside(calls[0], calls, found))
    assert "gpu.json, forward: measured" in printed and printed.endswith("+50%")
    table = show.table(calls, found).splitlines()
    assert table[2].endswith(" (H100, forward: +50%) |") and table[3].endswith("(H100, forward + backward: -20%) |")


@pytest.mark.parametrize("name", ["NVIDIA L4", "NVIDIA GH100-alike"])
def test_records_of_other_gpus(name, tmp_path):
    make_record(tmp_path, name, [row("forward", 1.0)])
    assert bool(measured.records(tmp_path)) == ("H100" in name)


def test_records_of_processors_are_none(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"conditions": {"device": {"kind": "cpu", "name": "H100"}}}))
    assert measured.records(tmp_path) == []


def test_all_that_is_said_of_a_call():
    printed = show.text(make_call(), list(DEVICES.values()), [])
    assert max(map(len, printed.splitlines())) <= 100
    for words in (
        "must move 1 MB",
        "1056 blocks of 8 warps",
        "sm_80, 2 launches",
        "A100: predicted",
        "H200: predicted",
    ):
        assert words in printed, printed


def test_a_gpu_for_which_the_operator_takes_less():
    call = make_call()
    said = show.text(replace(call, launches={90: call.launches[90]}), list(DEVICES.values()), [])
    assert "A100: the operator takes less" in said and "H100: predicted" in said and "A100: predicted" not in said


@pytest.mark.parametrize("words, meant", [([], True), (["ffn"], True), (["forward tied"], True), (["relu"], False)])
def test_words_choose_calls(words, meant):
    assert gpu_model._meant([make_call()], words) == ([str(make_call())] if meant else [])


def test_a_fatter_kernel_exceeds_its_budget(tmp_path):
    path, call = tmp_path / "budgets.json", make_call()
    budgets.save(path, [(call, {})])
    assert budgets.exceeded(call, path) == []
    fatter = replace(PRODUCT, instructions=PRODUCT.instructions | {"fp32": 1.5e6}, registers=67, spilled=8)
    assert budgets.exceeded(make_call(product=fatter), path) == [
        f"{call}, 0 product: 1.229e+05 warp instructions a token, +6% of 115700",
        f"{call}, 0 product: 8 bytes spilled, none is allowed",
    ]
    with_another = make_call(product=replace(PRODUCT, kernel="another"))
    assert "launches 0 another, and there is a budget for 0 product" in budgets.exceeded(with_another, path)[0]
