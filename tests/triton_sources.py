"""What the sources of Triton kernels say, read without running them."""

import ast
from collections import Counter
from pathlib import Path

_UNROLLED = 2  # times; enough to see that something happens more than once


def chained_products(source: str) -> list[str]:
    """Loops that add two products to one accumulator: "line: name".

    Triton 3.6 to 3.8 makes a wrong result of them where tcgen05 multiplies (triton-lang/triton#10821): of an iteration,
    the first product may begin before the second one of the iteration before has ended.
    """
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    found = []
    for function in functions.values():
        for loop in (node for node in ast.walk(function) if isinstance(node, ast.For) and not _is_unrolled(node)):
            products = _Products(functions)
            products.run(loop.body)
            found += [f"{loop.lineno}: {name}" for name, count in products.carried().items() if count > 1]
    return found


def files() -> list[Path]:
    """Of all Triton kernels of the package."""
    import tokenfusion

    return sorted(Path(tokenfusion.__file__).parent.rglob("triton*_kernels.py"))


def _is_unrolled(loop: ast.For) -> bool:
    return isinstance(loop.iter, ast.Call) and ast.unparse(loop.iter.func).endswith("static_range")


def _is_product(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".dot")


class _Products:
    """How many products each accumulator gets in some statements; those begun in them are named apart."""

    def __init__(self, functions: dict[str, ast.FunctionDef]):
        self.functions = functions
        self.accumulator: dict[str, str] = {}  # what a name adds to
        self.counts: Counter[str] = Counter()
        self.begun = 0

    def carried(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if not name.startswith("begun ")}

    def run(self, statements: list[ast.stmt], turn: str = "") -> None:
        for statement in statements:
            if isinstance(statement, ast.For):
                if _is_unrolled(statement):
                    for i in range(_UNROLLED):
                        self.run(statement.body, f"{turn}, turn {i} of {ast.unparse(statement.target)}")
            elif isinstance(statement, ast.If):
                self.run(statement.body, turn)
                self.run(statement.orelse, turn)
            elif isinstance(statement, ast.Assign | ast.AugAssign | ast.Expr | ast.Return):
                self._assign(statement, turn)

    def _assign(self, statement, turn: str) -> None:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        target = ast.unparse(targets[0]) if targets[0] is not None else ""
        to = self._name(targets[0], turn) if isinstance(statement, ast.AugAssign) else self._summand(statement.value)
        for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
            to = self._call(call, turn, to)
        if to is None and statement.value is not None:
            sources = [node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)]
            to = self.accumulator.get(target, target) if target in sources else self._begin()
        if target:
            self.accumulator[target] = to

    def _summand(self, value: ast.expr | None) -> str | None:
        """What a product is added to by +."""
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            for one, other in ((value.left, value.right), (value.right, value.left)):
                if isinstance(one, ast.Name) and _is_product(other):
                    return self._name(one, "")
        return None

    def _call(self, call: ast.Call, turn: str, to: str | None) -> str | None:
        """Counts the products of a call, and returns what they were added to."""
        name = ast.unparse(call.func)
        if _is_product(call):
            others = [keyword.value for keyword in call.keywords if keyword.arg == "acc"]
            given = call.args[2:3] or others
            to = self._name(given[0], turn) if given else to or self._begin()
            self.counts[to] += 1
        elif name in self.functions:
            function = self.functions[name]
            inner = _Products(self.functions)
            inner.run(function.body)
            arguments = dict(zip((each.arg for each in function.args.args), call.args))
            for parameter, count in inner.carried().items():
                base = parameter.partition("[")[0]
                if base in arguments and count:
                    to = self._name(arguments[base], turn)
                    self.counts[to + parameter.removeprefix(base)] += count  # of a tuple's element or of all
        return to

    def _name(self, node: ast.expr, turn: str) -> str:
        text = ast.unparse(node)
        if isinstance(node, ast.Subscript):
            return f"{text}{turn}"
        if not isinstance(node, ast.Name):
            return self._begin()
        return self.accumulator.get(text, text)

    def _begin(self) -> str:
        self.begun += 1
        return f"begun {self.begun}"
