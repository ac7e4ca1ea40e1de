"""The tied layers of a transformer against layers with a matrix for each use, their gradients summed."""

import os
import socket

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.crossvit import randomize
from tests.layers.tied import copy_values, with_gradients
from tests.parity import assert_runs
from tokenfusion.layers import TiedAttention, TiedFFN

B, N, C = 2, 7, 16


@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU, nn.SiLU, nn.Identity])
def test_ffn_is_the_untied_mlp(act_layer):
    tied = randomize(TiedFFN(C, 40, act_layer=act_layer)).double()
    mlp = Mlp(C, 40, act_layer=act_layer).double()
    copy_values(((mlp.fc1.weight, tied.weight), (mlp.fc1.bias, tied.bias_in)))
    copy_values(((mlp.fc2.weight, tied.weight.t()), (mlp.fc2.bias, tied.bias_out)))
    x = torch.randn(B, N, C, dtype=torch.float64)
    y, (dx, dw, db_in, db_out) = with_gradients(tied, x, (tied.weight, tied.bias_in, tied.bias_out))
    parameters = (mlp.fc1.weight, mlp.fc2.weight, mlp.fc1.bias, mlp.fc2.bias)
    want, (dx_, dw1, dw2, db1, db2) = with_gradients(mlp, x, parameters)
    torch.testing.assert_close((y, dx, dw, db_in, db_out), (want, dx_, dw1 + dw2.t(), db1, db2))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_the_untied_attention(bias):
    tied = randomize(TiedAttention(C, 4, qkv_bias=bias, proj_bias=bias)).double()
    attn = Attention(C, 4, qkv_bias=bias, proj_bias=bias).double()
    w_q, w_kv = tied.weight_q, tied.weight_kv
    copy_values(((attn.qkv.weight, torch.cat((w_q, w_kv, w_kv.t()))), (attn.proj.weight, w_q.t())))
    biases = []
    if bias:
        biases = [tied.bias_q, tied.bias_k, tied.bias_v, tied.bias_out]
        copy_values(((attn.qkv.bias, torch.cat(biases[:3])), (attn.proj.bias, tied.bias_out)))
    x = torch.randn(B, N, C, dtype=torch.float64)
    y, (dx, dq, dkv, *db) = with_gradients(tied, x, (w_q, w_kv, *biases))
    parameters = [attn.qkv.weight, attn.proj.weight, *([attn.qkv.bias, attn.proj.bias] if bias else [])]
    want, (dx_, dqkv, dproj, *db_) = with_gradients(attn, x, parameters)
    torch.testing.assert_close((y, dx), (want, dx_))
    torch.testing.assert_close(dq, dqkv[:C] + dproj.t())
    torch.testing.assert_close(dkv, dqkv[C : 2 * C] + dqkv[2 * C :].t())
    if bias:
        torch.testing.assert_close(torch.cat(db[:3]), db_[0])
        torch.testing.assert_close(db[3], db_[1])


def test_attention_takes_masks_as_timms_does():
    tied = randomize(TiedAttention(C, 4))
    x = torch.randn(B, N, C)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    torch.testing.assert_close(tied(x, is_causal=True), tied(x, attn_mask=mask))


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: TiedFFN(8, 16, out_features=12), ["out_features", "12", "8"]),
        (lambda: TiedFFN(8, 16, act_layer=nn.Tanh), ["act_layer", "Tanh", "gelu"]),
        (lambda: TiedFFN(8, 16, norm_layer=nn.LayerNorm), ["norm_layer", "None"]),
        (lambda: TiedAttention(10, 4), ["dim", "10", "4"]),
        (lambda: TiedAttention(8, 4, qk_norm=True), ["qk_norm", "False"]),
    ],
)
def test_bad_arguments(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts)


def test_half_the_parameters_of_the_untied_layers():
    def matrices(module):
        return sum(p.numel() for p in module.parameters() if p.dim() == 2)

    assert 2 * matrices(TiedFFN(C, 40)) == matrices(Mlp(C, 40))
    assert 2 * matrices(TiedAttention(C)) == matrices(Attention(C))


def test_dropout_drops_in_training_alone():
    torch.manual_seed(0)
    tied = randomize(TiedFFN(C, 40, drop=0.5))
    x = torch.randn(B, N, C)
    tied.eval()
    assert torch.equal(tied(x), tied(x))
    mean = torch.stack([tied.train()(x) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, tied.eval()(x), rtol=0.2, atol=0.2)


def test_ffn_runs_the_kernel_under_compile_and_autocast():
    tied = randomize(TiedFFN(C, 40))
    x = torch.randn(B, N, C)
    torch.compiler.reset()
    compiled = torch.compile(tied, fullgraph=True, backend="aot_eager")
    with assert_runs("tied_ffn_cpu", "tied_ffn_backward_cpu"):
        compiled(x).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16), assert_runs("tied_ffn_cpu"):
        assert tied(x).dtype == torch.bfloat16


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ffn, self.out = TiedAttention(C, 4), TiedFFN(C, 40), nn.Linear(C, 3)

    def forward(self, x):
        x = x + self.attn(x)
        return self.out(x + self.ffn(x))


def _step(net, x, optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x).flatten(0, 1), (torch.arange(N) % 3).repeat(len(x))).backward()
    optimizer.step()


def _wrapped(wrapper: str, net: nn.Module) -> nn.Module:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net.ffn, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _two_steps_of_each_wrapper(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    state = torch.load(path, weights_only=True)
    for wrapper in ("ddp", "fsdp2"):
        net = _Net()
        net.load_state_dict(state["before"])
        net = _wrapped(wrapper, net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(2):
            _step(net, state["x"][2 * rank : 2 * rank + 2], optimizer)
        for name, parameter in net.named_parameters():
            full = parameter.full_tensor() if wrapper == "fsdp2" else parameter
            want = state["after"][name.removeprefix("module.")]
            torch.testing.assert_close(full.detach(), want, rtol=1e-4, atol=1e-6, msg=f"{wrapper}: {name}")
    torch.distributed.destroy_process_group()


def test_two_processes_step_as_one(tmp_path):
    net = randomize(_Net())
    x = torch.randn(4, N, C)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(2):
        _step(net, x, optimizer)
    path = tmp_path / "state.pt"
    torch.save({"before": before, "after": net.state_dict(), "x": x}, path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_two_steps_of_each_wrapper, (port, str(path)), nprocs=2)
