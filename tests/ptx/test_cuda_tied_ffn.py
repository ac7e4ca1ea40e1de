"""The CUDA kernels of tied_ffn as nvcc compiles them, launched by their own host, against PyTorch."""

import ctypes
import re

import pytest
import torch

from tests.gradients import check_frozen, in_float64, with_gradients
from tests.parity import assert_parity
from tests.ptx.gpu import Gpu, Launch
from tests.ptx.launch import launch
from tests.ptx.memory import Memory
from tests.ptx.schedule import Order
from tests.ptx.sources import MARKS, check_same_code, kernel, program
from tests.sass import ELEMENTS
from tests.tied_ffn.cases import check_parity, make_inputs
from tokenfusion.kernels.tied_ffn import reference

pytestmark = MARKS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL = re.compile(r"\d(forward|backward)_kernelI(f|6__half|13__nv_bfloat16)NS0_\d+([A-Za-z]+?)EEEv")
NAMES = {"Gelu": "gelu", "GeluTanh": "gelu_tanh", "Relu": "relu", "Silu": "silu", "Identity": "identity"}
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]


class Pass(ctypes.Structure):
    """TiedFfnPass of csrc/cuda/tied_ffn.h."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("activated", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("line", ctypes.c_int64),
        ("depth", ctypes.c_int32),
        ("grad", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
    ]


def gpu(**device) -> Gpu:
    return Gpu("tied_ffn", **device)


def feed_forward(x, weight, bias_in=None, bias_out=None, *, activation="gelu", hold=False):
    return torch.ops.tokenfusion.tied_ffn_cuda(x, weight, bias_in, bias_out, activation, hold)[0]


def described(mangled: str) -> tuple[str, torch.dtype, str]:
    """Direction, dtype and activation of a kernel."""
    direction, element, activation = KERNEL.search(mangled).groups()
    return direction, getattr(torch, ELEMENTS[element]), NAMES[activation]


def named(direction: str, dtype: torch.dtype, activation: str = "gelu") -> str:
    return next(name for name in program("tied_ffn").names if described(name) == (direction, dtype, activation))


def pass_of(found: Launch) -> Pass:
    return Pass.from_buffer_copy(found.arguments[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, dtype):
    with gpu() as device:
        inputs = make_inputs(2, 21, channels=9, features=20, dtype=dtype)
        check_parity(feed_forward, inputs, activation=activation, hold=dtype == torch.bfloat16)
    expected = [(direction, dtype, activation) for direction in ("forward", "backward")]
    assert [described(each.kernel) for each in device.launches] == expected


def test_these_are_all_kernels():
    kinds = {(direction, dtype, name) for direction in ("forward", "backward") for dtype in DTYPES for name in NAMES}
    found = [described(name) for name in program("tied_ffn").names]
    assert len(found) == len(kinds) and set(found) == {(*rest, NAMES[name]) for *rest, name in kinds}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, channels, features", [(40, 1, 1), (1, 5, 8), (5, 3, 7), (6, 16, 40), (257, 7, 13)])
def test_any_sizes(tokens, channels, features, dtype):
    with gpu():
        check_parity(feed_forward, make_inputs(tokens, channels=channels, features=features, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_lines_a_thread_and_several_chunks(dtype):
    with gpu() as device:
        check_parity(feed_forward, make_inputs(300, channels=256, features=300, dtype=dtype))
    found = list(map(pass_of, device.launches))
    assert [each.elements for each in found] == [256 * 300, 44 * 300] * 2
    depths = {each.depth for each in found}
    assert max(depths) > 8 and any(depth % 4 for depth in depths)
    assert all(each.elements // each.line > each.depth for each in found), "there is one sum alone"


def test_long_sums():
    with gpu() as device:
        check_parity(feed_forward, make_inputs(1031, channels=8, features=256, dtype=torch.bfloat16))
    assert {pass_of(each).depth for each in device.launches} == {32}


def test_chunks_are_for_the_gpu():
    """A product has two tiles of 128 x 128 for each multiprocessor, if that is no more than 64 MB."""

    def chunks(tokens: int, channels: int, features: int, dtype: torch.dtype) -> list[int]:
        with gpu(multiprocessors=8, interpret=False) as device:
            feed_forward(*(torch.zeros(size, dtype=dtype) for size in ((tokens, channels), (features, channels))))
        return [pass_of(each).elements // features for each in device.launches]

    assert chunks(600, 1024, 64, torch.float32) == [600]
    assert chunks(2 * 1024, 256, 512, torch.float32) == [1024, 1024]
    assert chunks(2 * 1024 - 1, 256, 512, torch.float32) == [2 * 1024 - 1]
    assert chunks(1000, 1, 1 << 17, torch.float32) == [256, 256, 256, 232]
    assert chunks(1000, 1, 1 << 17, torch.bfloat16) == [384, 384, 232]


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_biases_may_be_absent(biases):
    with gpu():
        check_parity(feed_forward, make_inputs(2, 10, channels=16, features=24, dtype=torch.float32, biases=biases))


@pytest.mark.parametrize("leading", [(), (2, 3, 4)])
def test_any_number_of_dimensions(leading):
    with gpu():
        check_parity(feed_forward, make_inputs(*leading, channels=8, features=12, dtype=torch.float32), hold=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_over_their_whole_range(activation, dtype):
    """Zero, tiny, huge, infinite and undefined pre-activations, forward and in the derivative."""
    with gpu(approximate=True):
        x = torch.cat((torch.linspace(-40, 40, 4001), torch.tensor(SPECIAL))).to(dtype)[:, None].requires_grad_()
        inputs = x, torch.ones(1, 1, dtype=dtype), None, None, torch.ones_like(x)
        results = with_gradients(feed_forward, inputs, activation=activation)
    eager = with_gradients(reference.tied_ffn, inputs, activation=activation)
    exact = with_gradients(reference.tied_ffn, in_float64(inputs), activation=activation)
    for name, got, unfused, precise in zip(("y", "x"), results, eager, exact, strict=True):
        assert torch.equal(got.isnan(), precise.isnan()) and torch.equal(got.isinf(), precise.isinf()), name
        finite = precise.isfinite()
        assert_parity(got[finite], unfused[finite], precise[finite], name)
        if dtype == torch.float32:
            torch.testing.assert_close(got[finite].double(), precise[finite], rtol=1e-6, atol=2e-7)


def test_where_relu_is_zero_it_has_no_gradient():
    """Not even an infinite one."""
    with gpu():
        x = torch.tensor([[-1.0], [0.0], [1.0]], requires_grad=True)
        grad = torch.full_like(x, torch.inf)
        _, got = with_gradients(feed_forward, (x, torch.ones(1, 1), None, None, grad), activation="relu")
    assert got.flatten().tolist() == [0, 0, torch.inf]


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {3}, {0, 1}, {1, 2, 3}, {0, 1, 2}, {0, 2, 3}], ids=str)
def test_frozen_inputs(frozen):
    with gpu():
        inputs = make_inputs(2, 10, channels=16, features=24, dtype=torch.bfloat16)
        check_frozen(feed_forward, inputs, frozen, hold=1 in frozen)


def test_neither_holding_nor_the_order_of_warps_changes_a_bit():
    results = []
    for hold, order in ((False, Order.ROUND_ROBIN), (False, Order.REVERSED), (True, 5)):
        with gpu(order=order):
            inputs = make_inputs(300, channels=256, features=20, dtype=torch.bfloat16)
            results.append(with_gradients(feed_forward, inputs, hold=hold))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("hold, tensors", [(False, 1), (True, 6)])
def test_what_is_held(hold, tensors):
    held = []
    with gpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        x, weight, bias_in, bias_out, _ = make_inputs(64, channels=8, features=40, dtype=torch.float32)
        feed_forward(x * 1, weight, bias_in, bias_out, hold=hold)
    parameters = {t.data_ptr() for t in (weight, bias_in, bias_out)}
    assert sum(t.nbytes for t in held if t.data_ptr() not in parameters) == tensors * x.nbytes


def test_strided_operands():
    dtype = torch.bfloat16
    with gpu():
        x, weight, bias_in, bias_out, grad = make_inputs(3, 11, channels=16, features=24, dtype=dtype)
        between = torch.full((5, 13, 40), torch.nan, dtype=dtype)
        views = {
            "rows in a larger tensor": between[1:4, 1:12, 3:19].copy_(x.detach()),
            "tokens before batch": x.detach().transpose(0, 1).contiguous().transpose(0, 1),
            "channels not innermost": x.detach().mT.contiguous().mT,
        }
        want = with_gradients(feed_forward, (x, weight, bias_in, bias_out, grad))
        for name, view in views.items():
            columns = weight.detach().t().contiguous().t().requires_grad_()
            wide = torch.stack((grad, grad), -1)[..., 0]
            got = with_gradients(feed_forward, (view.requires_grad_(), columns, bias_in, bias_out, wide))
            for result, expected in zip(got, want, strict=True):
                torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7, msg=name)
        ones = torch.ones((), dtype=dtype).expand(3, 11, 16)
        want, got = (with_gradients(feed_forward, (x, weight, bias_in, bias_out, g)) for g in (ones.contiguous(), ones))
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_held_layer_anywhere_in_memory(dtype):
    with gpu():
        x, weight, bias_in, _, grad = (t.detach() for t in make_inputs(7, channels=4, features=10, dtype=dtype))
        _, hidden = torch.ops.tokenfusion.tied_ffn_cuda(x, weight, bias_in, None, "gelu", True)

        def gradients(hidden):
            arguments = grad, x, weight, bias_in, hidden, "gelu", [True] * 4
            return torch.ops.tokenfusion.tied_ffn_backward_cuda(*arguments)

        want = gradients(hidden)
        for view in (torch.cat((hidden[:1], hidden)).flatten()[9:79].view(7, 10), hidden.t().contiguous().t()):
            view.copy_(hidden)
            assert all(map(torch.equal, gradients(view), want))


def test_no_elements():
    with gpu() as device:
        y, *grads = with_gradients(feed_forward, make_inputs(0, 5, channels=4, features=8, dtype=torch.bfloat16))
        assert y.shape == (0, 5, 4)
        assert len(grads) == 4 and not any(grad.any() for grad in grads)
    assert not device.launches


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_elements_beyond_the_range_of_32_bits(direction):
    """Two lines, each longer than that, of which the first and the last block run."""
    line, dtype = 2**31 + 64, torch.bfloat16
    numbers = torch.empty(0, dtype=dtype)
    numbers.untyped_storage().resize_(2 * line * 2)  # pages that nobody touches take no memory
    numbers.set_(numbers.untyped_storage(), 0, (2, line))
    memory = Memory()
    address = memory.allow(numbers)
    blocks = -(-line // 8 // 256)
    ends = numbers[:, :2048], numbers[:, -64:]
    for each in ends:
        each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(0)))
    before = [each.double().requires_grad_() for each in ends]
    of_backward = {} if direction == "forward" else {"grad": address}
    found = Pass(hidden=address, activated=None if of_backward else address, elements=2 * line, line=line, depth=2)
    for name, value in of_backward.items():
        setattr(found, name, value)
    some = [(0, 0, 0), (blocks - 1, 0, 0)]
    launch(kernel("tied_ffn", 90, named(direction, dtype)), [bytes(found)], blocks, 256, memory=memory, blocks=some)
    for got, u in zip(ends, before, strict=True):
        want = reference.ACTIVATIONS["gelu"](u)
        if direction == "backward":
            (want,) = torch.autograd.grad(want, u, u)
        torch.testing.assert_close(got, want.to(dtype), rtol=2**-7, atol=2**-7)


def test_kernels_for_compute_capability_80():
    with gpu(capability=80):
        check_parity(feed_forward, make_inputs(2, 21, channels=9, features=20, dtype=torch.bfloat16))


def test_kernels_for_both_capabilities_are_the_same_but_for_a_conversion():
    check_same_code("tied_ffn")
