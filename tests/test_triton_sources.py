"""No Triton kernel has a form that Triton is known to compile wrongly."""

import textwrap

import pytest

from tests import triton_sources


@pytest.mark.parametrize("path", triton_sources.files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_loop_adds_two_products_to_one_accumulator(path):
    assert triton_sources.chained_products(path.read_text()) == []


WRONG = {
    "one after the other": """
        c = tl.zeros([16, 16], tl.float32)
        for i in range(0, n, 16):
            c = tl.dot(a, b, c)
            c = tl.dot(d, e, c, input_precision="ieee")
        """,
    "by name": """
        for i in tl.range(0, n):
            c = tl.dot(a, b, acc=c)
            if odd:
                c = tl.dot(d, e, acc=c)
        """,
    "added": """
        for i in range(n):
            c += tl.dot(a, b)
            c = c + tl.dot(d, e)
        """,
    "under another name": """
        for i in range(n):
            f = tl.dot(a, b, c)
            c = tl.dot(d, e, f)
        """,
    "unrolled": """
        for i in range(n):
            for j in tl.static_range(len(a)):
                c = tl.dot(a[j], b[j], c)
        """,
    "in a function": """
        for i in range(n):
            c = twice(a, b, c)
        """,
}
RIGHT = {
    "two accumulators": """
        for i in range(n):
            c = tl.dot(a, b, c)
            f = tl.dot(d, e, f)
        return c + f
        """,
    "two loops": """
        for i in range(n):
            c = tl.dot(a, b, c)
        for i in range(n):
            c = tl.dot(d, e, c)
        """,
    "begun in the loop": """
        for i in range(n):
            c = tl.zeros([16, 16], tl.float32)
            for j in tl.static_range(len(a)):
                c = tl.dot(a[j], b[j], c)
            f = f + tl.sum(c)
        """,
    "of a fresh product": """
        for i in range(n):
            c = tl.dot(a, b)
            c = tl.dot(d, e, c)
            tl.store(p + i, c)
        """,
    "one of each element": """
        for i in range(n):
            new = ()
            for j in tl.static_range(len(c)):
                new = new + (tl.dot(a[j], b, c[j]),)
            c = new
        """,
}
TWICE = """
@triton.jit
def twice(a, b, c):
    c = tl.dot(a, b, c)
    return tl.dot(a, b, c)


@triton.jit
def kernel(a, b, c, d, e, f, n, odd):
"""


@pytest.mark.parametrize("name", WRONG)
def test_such_loops_are_found(name):
    assert len(triton_sources.chained_products(TWICE + textwrap.indent(textwrap.dedent(WRONG[name]), "    "))) == 1


@pytest.mark.parametrize("name", RIGHT)
def test_others_are_not(name):
    assert triton_sources.chained_products(TWICE + textwrap.indent(textwrap.dedent(RIGHT[name]), "    ")) == []
