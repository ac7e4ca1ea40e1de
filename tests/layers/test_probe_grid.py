"""A grid of probes against its probes one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.crossvit import randomize
from tests.drop_in import FORWARD, check_parity
from tests.parity import assert_runs
from tokenfusion.kernels import dispatch
from tokenfusion.layers import ProbeGrid, SingleQueryAttention

DIM = 48


def probe(num_heads=6, num_latents=1, **options):
    attention = SingleQueryAttention(DIM, num_heads, num_latents=num_latents, **options)
    return nn.Sequential(attention, nn.Flatten(), nn.Linear(num_latents * DIM, 5))


def grid_of(*probes, kind=None):
    return randomize((kind or ProbeGrid)(probes))


def three(**options):
    torch.manual_seed(0)
    return grid_of(probe(6, **options), SingleQueryAttention(DIM, 4, num_latents=3, **options), probe(2, 2, **options))


class Joined(nn.Module):
    """One tensor of all that the probes give; plain: what each of them computes without the kernel."""

    def __init__(self, grid, plain=False):
        super().__init__()
        self.grid, self.plain = grid, plain

    def forward(self, tokens):
        return torch.cat([out.flatten(1) for out in (self.one_by_one if self.plain else self.grid)(tokens)], dim=1)

    def one_by_one(self, tokens):
        for each in self.grid.probes:
            attention, *rest = each if isinstance(each, nn.Sequential) else [each]
            yield nn.Sequential(*rest)(attention.plain_forward(tokens))


def forward_calls(call):
    with dispatch.observe() as seen:
        call()
    return seen.ran.count(("single_query_attention", "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm}, {"qkv_bias": False}], ids=str)
def test_parity(options, dtype):
    grid = three(**options).to(dtype)
    check_parity(Joined(grid), Joined(copy.deepcopy(grid), plain=True), torch.randn(3, 40, DIM).to(dtype))


@pytest.mark.parametrize("heads", [[6, 4, 2], [16] * 9, [24] * 5], ids=str)
def test_one_call_of_the_kernel(heads):
    grid, tokens = grid_of(*map(probe, heads)), torch.randn(2, 20, DIM)
    assert forward_calls(lambda: grid(tokens)) == 1
    assert forward_calls(lambda: grid.plain_forward(tokens)) == len(heads)


def test_a_probe_is_a_module_of_its_own():
    grid, tokens = three(), torch.randn(3, 40, DIM)
    alone = probe(6)
    alone.load_state_dict(grid.probes[0].state_dict())
    torch.testing.assert_close(alone(tokens), grid(tokens)[0])
    assert [f"probes.0.{name}" for name in alone.state_dict()] == list(grid.state_dict())[: len(alone.state_dict())]


def test_random_numbers_of_what_follows():
    grid, results = three(), []
    for each in (grid.probes[0], grid.probes[2]):
        each.insert(2, nn.Dropout(0.5))
    for form in (grid, grid.plain_forward):
        torch.manual_seed(3)
        results.append(form(torch.ones(3, 40, DIM)))
    torch.testing.assert_close(*results)


def test_hooks_of_what_is_called():
    grid, seen = three(), []
    for part in (grid.probes[0][0].proj, grid.probes[0][2]):
        part.register_forward_hook(lambda module, args, out: seen.append(module))
    assert forward_calls(lambda: grid(torch.randn(3, 40, DIM))) == 1 and len(seen) == 2


def hooked(select):
    return lambda grid: select(grid).register_forward_hook(lambda module, args, out: out + 1)


def with_rate(grid):
    grid.probes[1].dropout = 0.3


def with_dropout_in_the_query(grid):
    grid.probes[0][0].q = nn.Sequential(grid.probes[0][0].q, nn.Dropout(0.5))


CHANGES = {
    "a hook on a probe": (hooked(lambda grid: grid.probes[2]), "probes.2: it has hooks"),
    "a hook on an attention": (hooked(lambda grid: grid.probes[1]), "probes.1: its attention has hooks"),
    "a hook on the keys": (hooked(lambda grid: grid.probes[0][0].k), "probes.0: k has hooks"),
    "a hook on the query": (hooked(lambda grid: grid.probes[0][0].q), "probes.0: q has hooks"),
    "pruned": (lambda grid: prune.random_unstructured(grid.probes[1].v, "weight", 0.5), "probes.1: v has hooks"),
    "dropout": (with_rate, "probes.1: dropout in training"),
    "another norm": (lambda grid: setattr(grid.probes[1].norm, "eps", 0.5), "probes.1: its dtype, or the norm"),
    "no norm": (lambda grid: setattr(grid.probes[0][0], "norm", None), "probes.1: its dtype, or the norm"),
    "another query": (with_dropout_in_the_query, "probes.0: q is Sequential"),
    "queries of each image": (
        lambda grid: setattr(grid.probes[1], "latent", nn.Parameter(torch.randn(3, 1, DIM))),
        "probes.1: its learned queries are [3, 1, ",
    ),
    "another class": (lambda grid: grid.probes.insert(0, nn.Linear(DIM, 3)), "probes.0: its attention is Linear"),
    "nothing": (lambda grid: grid.probes.insert(0, nn.Sequential()), "probes.0: its attention is NoneType"),
}


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES)
def test_a_changed_probe_is_called(change, reason, caplog):
    grid, tokens, results = three(norm_layer=nn.LayerNorm), torch.randn(3, 40, DIM), []
    change(grid)
    for form in (grid, lambda tokens: [each(tokens) for each in grid.probes]):
        torch.manual_seed(3)
        results.append(form(tokens))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert reason in caplog.text


def test_packed_tokens_go_to_each_probe(monkeypatch):
    monkeypatch.setattr(ProbeGrid, "plain_forward", lambda grid, tokens: "one by one")
    bags = torch.nested.nested_tensor([torch.randn(3, DIM), torch.randn(5, DIM)], layout=torch.jagged)
    assert three()(bags) == "one by one"


def test_dropout_at_evaluation_shares_the_kernel():
    grid = three(dropout=0.3).eval()
    assert forward_calls(lambda: grid(torch.randn(3, 40, DIM))) == 1


def test_a_probe_of_another_dtype_raises_as_it_does_alone():
    grid, tokens = three(), torch.randn(3, 40, DIM)
    grid.probes[1].double()
    with pytest.raises(TypeError) as alone:
        grid.probes[1](tokens)
    with pytest.raises(TypeError) as caught:
        grid(tokens)
    assert str(caught.value) == str(alone.value)


def test_autocast():
    grid, tokens = three(), torch.randn(3, 40, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(grid(tokens), [each(tokens) for each in grid.probes])


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    grid, tokens = three(norm_layer=nn.LayerNorm), torch.randn(3, 40, DIM)
    with torch.no_grad(), assert_runs(FORWARD):
        out = torch.compile(grid, fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(out, grid(tokens))


def test_scripted():
    grid, tokens = three(), torch.randn(3, 40, DIM)
    torch.testing.assert_close(torch.jit.script(grid)(tokens), grid(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "probes, error, parts",
    [
        (lambda: [], ValueError, ["probes", "none", "at least one"]),
        (lambda: [nn.Linear(4, 4)], TypeError, ["probes", "number 0", "Linear", "SingleQueryAttention"]),
        (lambda: [probe(), nn.Sequential(nn.Linear(4, 4))], TypeError, ["number 1", "Sequential"]),
        (lambda: [probe(), probe(num_latents=0)], ValueError, ["number 1", "num_latents = 0"]),
        (lambda: [probe(), SingleQueryAttention(16, 2, num_latents=1)], ValueError, ["dim", "[16, 48]"]),
    ],
)
def test_bad_input(probes, error, parts):
    with pytest.raises(error) as caught:
        ProbeGrid(probes())
    assert all(part in str(caught.value) for part in parts)
