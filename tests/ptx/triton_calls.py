"""Calls of the operators on a worker, with their Triton kernels compiled for a GPU and interpreted."""

import contextlib
import functools
import importlib
from dataclasses import dataclass, field
from unittest import mock

import torch


@dataclass(frozen=True)
class Call:
    """`operator` names a function below.

    host: what is set in the operator's host, such as fewer splits; tile_of: channels whose tile the host takes;
    form: one of the forms that the host knows (see `dispatch.Implementation`).
    """

    operator: str
    dtype: str
    arguments: dict = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    tile_of: int = 0
    form: str = ""

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in (self.arguments | self.host).items()]
        said += [f"{name}={value}" for name, value in (("tile_of", self.tile_of), ("form", self.form)) if value]
        return " ".join([self.operator, *said, self.dtype]).replace("'", "")


def check(call: Call, capability: int, **options) -> list:
    """The launches of a call whose result and gradients were checked; options: those of `hosts.launches`."""
    from tests.ptx import hosts

    with hosts.launches(capability, call.dtype, **options) as seen, _nan_where_nobody_wrote():
        _run(call)
    return seen


def launched(call: Call, capability: int) -> list:
    """What a call would launch: nothing is compiled."""
    from tests.ptx import hosts

    class Launched(Exception):
        pass

    def backward(*args, **kwargs):
        grad(*args, **kwargs)
        raise Launched

    grad = torch.autograd.grad
    with (
        hosts.launches(capability, call.dtype, run=False) as seen,
        mock.patch("torch.autograd.grad", backward),
        contextlib.suppress(Launched, AssertionError),  # of a call without gradients, whose result nobody computed
    ):
        _run(call)
    return seen


@contextlib.contextmanager
def _nan_where_nobody_wrote():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _run(call: Call) -> None:
    import tokenfusion

    function = globals()[f"_{call.operator}"]
    folder = _HOSTS.get(call.operator) or _HOSTS.get(call.arguments.get("op"), call.operator)
    host = importlib.import_module(f"tokenfusion.kernels.{folder}.triton_host")
    changed = dict(call.host)
    if call.tile_of:
        tile = host._tile
        changed["_tile"] = lambda channels, *others: tile(call.tile_of, *others)
    if call.form:
        changed |= {
            name: functools.partial(getattr(host, name), form=call.form) for name in ("run_forward", "run_backward")
        }
    with tokenfusion.backend("triton"), mock.patch.dict(vars(host), changed):
        function(dtype=getattr(torch, call.dtype), **call.arguments)


_HOSTS = {name: "single_query_attention" for name in ("attended", "padded", "packed")}
_HOSTS |= {"mixing_and_mean": "dynamic_mixing"}
_HOSTS |= {"concat": "upconv.concat", "project": "upconv.project", "add": "upconv.project"}


def _single_query_attention(*, normalize=True, first=0, needed=(True, True, True), **sizes):
    """first: elements by which the rows of the tokens are off a multiple of 16 bytes; needed: which gradients."""
    from tests.single_query_attention import cases

    query, tokens, extra, grad = cases.make_inputs(**sizes)
    if first:
        tokens = torch.nn.functional.pad(tokens.detach(), (first, 0))[..., first:]
    inputs = (t if t is None else t.detach().requires_grad_(n) for t, n in zip((query, tokens, extra), needed))
    cases.check((*inputs, grad), normalize=normalize)


def _attended(*, normalize=True, **sizes):
    """single_query_attention without gradients."""
    from tests.gradients import in_float64
    from tests.parity import assert_parity, assert_runs
    from tests.single_query_attention import cases
    from tokenfusion.kernels import single_query_attention
    from tokenfusion.kernels.single_query_attention import reference

    inputs = tuple(t if t is None else t.detach() for t in cases.make_inputs(**sizes)[:3])
    with assert_runs("single_query_attention_triton"):
        actual = single_query_attention(*inputs, normalize=normalize)
    eager, exact = (
        reference.single_query_attention(*tensors, normalize=normalize) for tensors in (inputs, in_float64(inputs))
    )
    assert_parity(actual, eager, exact, "context", summands=max(inputs[1].shape[1:]))


def _padded(*, lengths, normalize=True, **sizes):
    from tests.single_query_attention import cases, test_lengths

    test_lengths.check(cases.make_inputs(len(lengths), **sizes), lengths, "triton", normalize=normalize)


def _packed(*, bags, queries, channels, lengths=None, normalize=True, **options):
    from tests.single_query_attention import test_packed

    inputs = test_packed.make_inputs(bags, queries, channels, **options)
    test_packed.check(inputs, "triton", bags=bags, lengths=lengths, normalize=normalize)


def _tied_ffn(*, tokens, activation="gelu", recompute=True, **sizes):
    from tests.tied_ffn import cases

    cases.check(cases.make_inputs(tokens, **sizes), activation=activation, recompute=recompute)


def _dynamic_mixing(*, batch, height, width, channels, segments, dim, **options):
    from tests.dynamic_mixing import cases

    inputs = cases.make_inputs(batch, height, width, channels, segments=segments, dim=dim, **options)
    cases.check(inputs, segments=segments, dim=dim)


def _mixing_and_mean(*, batch, height, width, channels, segments, dim, **options):
    from tests.dynamic_mixing import cases
    from tests.gradients import in_float64
    from tests.parity import assert_parity, assert_trains
    from tokenfusion.kernels.dynamic_mixing import reference
    from tokenfusion.kernels.dynamic_mixing.op import mix

    x, weight, bias, *generate, grad = cases.make_inputs(
        batch, height, width, channels, segments=segments, dim=dim, **options
    )
    compressed = torch.nn.functional.linear(x, weight, bias).detach().requires_grad_()
    grads = grad, torch.randn(batch, channels, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def trained(function, tensors, grads):
        results = function(*tensors, segments=segments, dim=dim)
        return [*results, *torch.autograd.grad(results, tensors, grads)]

    def definition(*tensors, **options):
        mixed = reference.mix(*tensors, **options)
        return mixed, mixed.mean(dim=(1, 2))

    tensors = x, compressed, *generate
    with assert_trains("dynamic_mixing"):
        actual = trained(functools.partial(mix, with_mean=True), tensors, grads)
    unfused = trained(definition, tensors, grads)
    exact = trained(definition, in_float64(tensors), in_float64(grads))
    names = "mixed", "mean", "x", "compressed", "generate_weight", "generate_bias"
    for name, *results in zip(names, actual, unfused, exact, strict=True):
        assert_parity(*results, name=name, summands=batch * height * width)


def _upconv(*, op, skip_first=None, composes=None, **sizes):
    """composes: whether the projection is multiplied into the weight."""
    from tests.upconv import cases

    options = {} if skip_first is None else dict(skip_first=skip_first)
    chosen = contextlib.nullcontext()
    if composes is not None:
        chosen = mock.patch("tokenfusion.kernels.upconv.project.op._composing_pays", lambda *_: composes)
    with chosen:
        cases.check(op, cases.make_inputs(op, **sizes), **options)
