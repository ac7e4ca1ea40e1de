"""The result of a fused up-convolution among threads, processes, compilers, modes and copies of the model."""

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from tests.deferred import check, fused_copy, inputs, upconv
from tests.parity import assert_runs
from tests.surgery.test_deferred import cat

pytestmark = pytest.mark.usefixtures("within_a_model")

OP = "upconv_concat_cpu"


class TwoPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = upconv(), nn.Conv2d(7, 2, 1)

    def forward(self, x, skip):
        return self.head(torch.cat((self.up(x), skip), 1))


def test_many_threads_use_one_model():
    up, (_, skip) = fused_copy(upconv()), inputs()
    xs = torch.randn(64, 2, 6, 3, 5)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: cat(up, x, skip).detach(), xs))
    for x, joined in zip(xs, found, strict=True):
        torch.testing.assert_close(joined, cat(upconv(), x, skip).detach())


def test_many_threads_use_one_result():
    up, (x, skip) = fused_copy(upconv()), inputs()
    expected, interval = upconv()(x).detach(), sys.getswitchinterval()
    uses = [lambda y: y.data_ptr(), torch.ops.aten.sum, lambda y: torch.cat((y, skip), 1)]
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(10):
                y = up(x)
                found = [future.result() for future in [pool.submit(use, y) for use in uses * 8]]
                assert len(set(found[::3])) == 1
                torch.testing.assert_close(found[1].detach(), expected.sum())
                torch.testing.assert_close(found[2].detach()[:, :4], expected)
    finally:
        sys.setswitchinterval(interval)


class Joined(Dataset):
    def __init__(self):
        self.up, self.tensors = fused_copy(upconv()).requires_grad_(False), [t.detach() for t in inputs()]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        torch.set_num_threads(1)
        x, skip = self.tensors
        y = self.up(x * index)
        return torch.cat((y, skip), 1), y


def test_workers_that_fork_and_send_the_result():
    data = Joined()
    cat(data.up, *data.tensors)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for index, (joined, y) in enumerate(loader):
        x, skip = data.tensors
        torch.testing.assert_close(joined, cat(upconv(), x * index, skip).detach())
        torch.testing.assert_close(y, joined[:, :4])


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
    "EMA": AveragedModel,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_the_model(copied):
    model, tensors = fused_copy(TwoPart()), inputs()
    kept = model.up(tensors[0])
    other = copied(model)
    with torch.no_grad(), assert_runs(OP):
        torch.testing.assert_close(other(*tensors), model(*tensors))
    assert list(model.state_dict()) == list(TwoPart().state_dict())
    assert kept.shape == (2, 4, 6, 10)


def test_a_compiled_part_after_it():
    torch._dynamo.reset()
    head = torch.compile(lambda x, skip: torch.cat((x, skip), 1).sin(), backend="aot_eager")
    check(lambda up, x, skip: head(up(x), skip), runs=None)
    check(lambda up, x, skip: head(torch.cat((up(x), skip), 1), skip))


def test_a_compiled_model_is_the_plain_one():
    graphs = []

    def keep(graph, _inputs):
        graphs.append([(node.op, str(node.target)) for node in graph.graph.nodes])
        return graph

    plain = TwoPart()
    for model in (plain, fused_copy(plain)):
        torch._dynamo.reset()
        torch.compile(model, backend=keep, fullgraph=True)(*inputs())
    assert len(graphs) == 2 and graphs[0] == graphs[1]


def test_traced_exported_and_scripted():
    plain, tensors = TwoPart().eval(), inputs()
    fused = fused_copy(plain)
    for made in (
        torch.jit.trace(fused, tensors),
        torch.jit.script(fused),
        torch.export.export(fused, tensors).module(),
        torch.fx.symbolic_trace(fused),
    ):
        torch.testing.assert_close(made(*tensors), plain(*tensors))


class Sized(nn.Module):
    """A decoder that asks for the size of what it joins."""

    def __init__(self):
        super().__init__()
        self.up = upconv()

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.up(x, output_size=skip.shape[2:]), skip), 1)


def test_traced_by_fx_with_an_output_size():
    plain = Sized()
    fused = torch.fx.symbolic_trace(fused_copy(plain))
    for height in (16, 18):
        x, skip = torch.randn(2, 6, height // 2, 5), torch.randn(2, 3, height + 1, 10)
        torch.testing.assert_close(fused(x, skip), plain(x, skip))


def test_modes_that_watch_see_the_convolution():
    counts = []
    for up in (upconv(), fused_copy(upconv())):
        with FlopCounterMode(display=False) as counter:
            cat(up, *inputs()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_replicas_of_data_parallel(caplog):
    """They hold plain tensors in the place of parameters, and are others for each call."""
    up, (x, _) = upconv(), inputs()
    fused = fused_copy(up)
    for _ in range(2):
        replica = fused._replicate_for_data_parallel()
        replica.weight, replica.bias = (parameter.clone() for parameter in up.parameters())
        torch.testing.assert_close(replica(x), up(x))
    assert caplog.text.count("runs its original forward: it has weight no parameter") == 1


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_same_gradients(plain: nn.Module, fused: nn.Module, tensors) -> None:
    for model in (plain, fused):
        model(*tensors).square().sum().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        grad = b.grad if type(b.grad) is torch.Tensor else b.grad.full_tensor()
        torch.testing.assert_close(grad, a.grad, rtol=1e-4, atol=1e-4)


def test_distributed_data_parallel(one_process):
    for plain, tensors in ((TwoPart(), inputs()), (upconv(), inputs()[:1])):
        fused = nn.parallel.DistributedDataParallel(fused_copy(plain), find_unused_parameters=True)
        assert_same_gradients(plain, fused, tensors)


def test_fully_sharded(one_process):
    plain = TwoPart()
    fused = fused_copy(plain)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (fused.up, fused.head, fused):
        fully_shard(part, mesh=mesh)
    assert_same_gradients(plain, fused, inputs())


class Bottleneck(nn.Module):
    """Concatenates the result of a block that ends in an up-convolution."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Conv2d(6, 6, 1), upconv()), nn.Conv2d(7, 2, 1)

    def forward(self, x, skip):
        return self.head(torch.cat((self.block(x), skip), 1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_sharded_block_that_ends_in_an_up_convolution(one_process, mode):
    plain = Bottleneck()
    fused = fused_copy(plain)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (fused.block, fused):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    with mode():
        torch.testing.assert_close(fused(*inputs()), plain(*inputs()))
    assert_same_gradients(plain, fused, inputs())
