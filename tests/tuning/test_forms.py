"""Every form of the kernels: that it runs where it was chosen, forward and backward, and is right."""

import threading

import pytest
import torch

import tokenfusion
from tests.forms import forced
from tokenfusion.kernels import dispatch, extension
from tokenfusion.kernels.choices import Workload
from tokenfusion.kernels.dispatch import OPERATORS, Implementation
from tokenfusion.measure import peak_extra_bytes, profiler
from tokenfusion.tuning import proof

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason="built without the C++ extension")

_MAPS = [("k 2", "contiguous"), ("k 4", "channels_last")]
CALLS = {
    "single_query_attention": [((), (1, 300, 32, 3))],
    "tied_ffn": [((), (70, 16, 40))],
    "dynamic_mixing": [(("rows",), (3, 8, 8, 16, 2, 2)), (("columns",), (3, 8, 8, 16, 2, 2))],
    "upconv_concat": [(words, (8, 24, 32, 15)) for words in _MAPS],
    "upconv_add": [(words, (8, 24, 32, 15)) for words in _MAPS],
    "upconv_concat_project": [
        (words, sizes) for words in _MAPS for sizes in ((4, 8, 8, 16, 64, 8), (1, 64, 64, 64, 4, 8))
    ],
    "gated_sum": [(("projected",), (2, 80, 36, 16, 3)), ((), (2, 9, 36, 16, 3)), ((), (1, 9, 384, 256, 3))],
}
ON_TRITON = {
    "single_query_attention": [((), (1, 70, 32, 3))],
    "tied_ffn": [((), (20, 160, 48))],
    "upconv_concat": [(("k 2", "contiguous"), (1, 24, 16, 15))],
    "upconv_add": [(("k 2", "channels_last"), (1, 24, 16, 15))],
    "upconv_concat_project": [(("k 2", "contiguous"), (1, 24, 16, 8, 15, 8))],
}
DTYPES = {"cpu": ("float32", "bfloat16"), "triton": ("float16",)}
BACKWARD_BY_PYTORCH = {("gated_sum", "library"), ("gated_sum", "library backward")}
THERE = {"AMX": extension.amx_allowed(), "a product of our own": bool(extension.own_product_dtypes())}
NEEDS = {"vectors": "AMX", "vectors,few": "AMX"}
NEEDS |= dict.fromkeys(("library", "tiles", "projecting", "own backward", "library backward"), "a product of our own")


def call_of(workload: Workload) -> proof.Call:
    return proof.call_of(OPERATORS[workload.operator], workload, "cpu")


def workloads(operator: str, backend: str = "cpu") -> list[Workload]:
    calls = ON_TRITON if backend == "triton" else CALLS
    return [
        Workload(operator, (dtype, direction, *words), sizes)
        for dtype in DTYPES[backend]
        for direction in ("inference", "training")
        for words, sizes in calls[operator]
        if not (direction == "training" and "projected" in words)
    ]


def runnable(implementation: Implementation, operator: str) -> list[proof.Call]:
    calls = []
    for workload in workloads(operator, implementation.backend):
        call = call_of(workload)
        with torch.set_grad_enabled(call.maker.trains):
            if implementation.can_run(*call.selecting) is None:
                calls.append(call)
    return calls


FORMS = [
    pytest.param(operator.name, implementation, id=f"{operator.name}, {implementation.name}")
    for operator in OPERATORS.values()
    for implementation in operator.implementations
    if implementation.form
]


@pytest.mark.parametrize("operator, implementation", FORMS)
def test_every_form_runs_where_it_is_chosen_and_is_right(operator, implementation):
    if dispatch.backends()[implementation.backend] is not None:
        pytest.skip(f"no {implementation.backend} here")
    calls = runnable(implementation, operator)
    needed = NEEDS.get(implementation.form)
    if not calls and not THERE.get(needed, True):
        pytest.skip(f"there is not {needed} here")
    assert calls
    for call in calls:
        expected = proof.expected(call, OPERATORS[operator].implementations[-1])
        assert proof.why_wrong(call, implementation, expected) is None
        with forced(implementation.name) as seen, torch.set_grad_enabled(call.maker.trains):
            call.run(OPERATORS[operator].select(*call.selecting))
        assert {backend for _, backend in seen.ran} == {implementation.backend}
        if call.maker.trains and (operator, implementation.form) not in BACKWARD_BY_PYTORCH:
            assert any(name.endswith("_backward") for name, _ in seen.ran)


def host(operator: str):
    """The registered operator, to be called with the operands of `run` and a form."""
    from tokenfusion.kernels.dynamic_mixing import op as mixing
    from tokenfusion.kernels.gated_sum import op as gated_sum
    from tokenfusion.kernels.single_query_attention import op as attention
    from tokenfusion.kernels.tied_ffn import op as ffn
    from tokenfusion.kernels.upconv.concat import op as concat
    from tokenfusion.kernels.upconv.project import op as project

    modules = {
        "single_query_attention": attention,
        "tied_ffn": ffn,
        "upconv_concat": concat,
        "upconv_concat_project": project,
    }
    if operator == "dynamic_mixing":
        return lambda *operands: mixing._KERNELS["cpu"](*operands, "other")
    if operator == "gated_sum":
        return gated_sum._by_kernel(None, "other")
    return modules[operator]._run_on("cpu", "other")


@pytest.mark.parametrize("operator", sorted(CALLS.keys() - {"upconv_add"}))
def test_a_form_that_there_is_not_is_an_error_of_the_host(operator):
    call = call_of(workloads(operator)[0])
    with pytest.raises(ValueError, match="form: got 'other'"):
        host(operator)(*call.operands)


def run(operator: str, form: str, workload: Workload) -> list[torch.Tensor]:
    implementation = next(i for i in OPERATORS[operator].implementations if (i.backend, i.form) == ("cpu", form))
    return call_of(workload).run(implementation)


def ran(operator: str, form: str, workload: Workload) -> dict[str, int]:
    """How often PyTorch's own operators run, forward and backward."""
    with profiler() as profile:
        run(operator, form, workload)
    names = [event.name for event in profile.function_events]
    return {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize("words", _MAPS)
def test_whose_products_the_up_convolutions_are(words):
    workload = Workload("upconv_concat", ("float32", "training", *words), (8, 24, 32, 15))
    library = ran("upconv_concat", "library", workload)
    assert library["aten::mm"] >= 3
    in_place, tiles = ran("upconv_concat", "", workload), ran("upconv_concat", "tiles", workload)
    if torch.float32 in extension.own_product_dtypes():
        assert in_place != tiles
        assert not any("aten::mm" in found for found in (in_place, tiles))
    else:
        assert in_place == tiles == library


def test_whose_products_gated_sum_s_are():
    workload = Workload("gated_sum", ("float32", "inference", "projected"), (2, 80, 36, 16, 3))
    assert ran("gated_sum", "library", workload)["aten::mm"] >= 3
    assert "aten::mm" not in ran("gated_sum", "", workload)


@pytest.mark.parametrize("form", ["blas", "blas,hold"])
def test_whose_products_tied_ffn_s_are(form):
    workload = Workload("tied_ffn", ("float32", "training"), (70, 16, 40))
    blas = ran("tied_ffn", form, workload)
    assert "mkldnn::_linear_pointwise" not in blas and blas["aten::mm"] >= 3
    if torch.backends.mkldnn.is_available():
        assert ran("tied_ffn", form.removeprefix("blas").removeprefix(","), workload)["mkldnn::_linear_pointwise"] >= 3


def test_few_parts(set_threads):
    """One a thread; the built-in form has four, whose results are joined."""
    set_threads(1)
    workload = Workload("single_query_attention", ("float32", "inference"), (1, 300, 32, 3))
    parts = ran("single_query_attention", "", workload)["aten::empty"]
    assert ran("single_query_attention", "few", workload)["aten::empty"] < parts


@pytest.mark.skipif(not extension.amx_allowed(), reason="no AMX here")
@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize(
    "operator, words, sizes",
    [("single_query_attention", (), (2, 300, 256, 6)), ("dynamic_mixing", ("rows",), (3, 8, 8, 16, 2, 2))],
)
def test_vectors_are_what_runs_without_tiles(operator, words, sizes, direction):
    from tokenfusion import _C

    workload = Workload(operator, ("bfloat16", direction, *words), sizes)
    results, by_tiles = run(operator, "vectors", workload), run(operator, "", workload)
    _C.allow_amx(False)
    try:
        plain = run(operator, "", workload)
    finally:
        _C.allow_amx(True)
    assert all(map(torch.equal, results, plain))
    assert not all(map(torch.equal, results, by_tiles))


def test_tall_tiles_take_more_memory():
    workload = Workload("dynamic_mixing", ("float32", "inference", "rows"), (3, 8, 8, 16, 2, 2))
    tall, short = (peak_extra_bytes(lambda form=form: run("dynamic_mixing", form, workload)) for form in ("tall", ""))
    assert tall > short


@pytest.mark.skipif(not extension.own_product_dtypes(), reason="every product is the library's here")
@pytest.mark.parametrize("form, direction", [("library", "inference"), ("library", "training"), ("tiles", "inference")])
def test_compiled_code_keeps_the_form_as_a_constant(form, direction):
    torch.compiler.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, weight = torch.randn(2, 24, 3, 5), torch.randn(24, 16, 2, 2)
    skip = torch.randn(2, 16, 6, 10)
    x.requires_grad_(direction == "training")
    with forced(f"cpu:{form}"):
        tokenfusion.kernels.upconv_concat(x, weight, None, skip)
        compiled = torch.compile(tokenfusion.kernels.upconv_concat, fullgraph=True, backend=keep)
        compiled(x, weight, None, skip)
    (call,) = (node for node in graphs[0].graph.nodes if "upconv_concat_cpu" in str(node.target))
    assert call.args[-1] == form


def test_threads_run_forms_of_their_own():
    """A form is an argument, so that calls side by side share nothing."""
    workload = Workload("upconv_concat", ("float32", "training", "k 2", "contiguous"), (8, 24, 32, 15))
    alone = {form: run("upconv_concat", form, workload) for form in ("", "tiles", "library")}
    differing = []

    def repeat(form: str) -> None:
        for _ in range(20):
            if not all(map(torch.equal, run("upconv_concat", form, workload), alone[form])):
                differing.append(form)

    threads = [threading.Thread(target=repeat, args=(form,)) for form in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing
