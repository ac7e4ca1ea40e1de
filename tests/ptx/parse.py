"""PTX text to kernels whose statements are taken apart once."""

import functools
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import PtxError
from .formats import BITS, TYPES
from .operands import Address, Immediate, Pair, Register, Special, Symbol, Vector


@dataclass(frozen=True, eq=False)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: Register | None
    text: str
    line: int

    @functools.cached_property
    def types(self) -> tuple[str, ...]:
        return tuple(name for name in self.modifiers if name in TYPES)

    def has(self, *names: str) -> bool:
        return not self._words.isdisjoint(names)

    @functools.cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(self.modifiers)


class Parameter(NamedTuple):
    name: str
    type: str  # "b8" for a structure
    bytes: int
    offset: int


class Variable(NamedTuple):
    """A variable in shared or local memory; `bytes` is None where the launch says how many (extern)."""

    name: str
    bytes: int | None
    alignment: int


@dataclass(eq=False)
class Kernel:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # name: type, or prefix: type of prefix0, prefix1, ...
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    reqntid: tuple[int, ...] | None = None

    def register_type(self, name: str) -> str | None:
        found = self.registers.get(name)
        return found or self.registers.get(name.rstrip("0123456789"))


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{]*)\{", re.DOTALL)
_VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(\[\s*\d*\s*\])?")
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)\s*")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_TO_THE_END_OF_THE_LINE = re.compile(r"\.(?:loc|file)\s")


class Module(Mapping):
    """The kernels of a text by name; each is taken apart when it is asked for."""

    def __init__(self, text: str):
        self._text = text
        self._lines = [match.start() for match in re.finditer(r"^", text, re.MULTILINE)]
        declarations = re.finditer(r"\.shared\s+([^;]*);", _outside(text))
        self._shared = [_variable(match[1]) for match in declarations]
        self._entries = {match[1]: match for match in _ENTRY.finditer(text)}
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = self._read(self._entries[name])
        return self._kernels[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, match: re.Match) -> Kernel:
        kernel = Kernel(match[1], _parameters(match[2] or ""), shared=list(self._shared))
        size = re.search(r"\.reqntid\s+([\d,\s]+)", match[3])
        if size:
            kernel.reqntid = tuple(int(each) for each in size[1].split(","))
        _Body(kernel, self._text, match.end(), self._lines).read()
        return kernel


def parse(text: str) -> Mapping[str, Kernel]:
    """The kernels of a module by name."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return Module(text)


def _outside(text: str) -> str:
    """What stands outside of all functions."""
    kept, depth = [], 0
    for part in re.split(r"([{}])", text):
        depth += (part == "{") - (part == "}")
        if depth == 0:
            kept.append(part)
    return "".join(kept)


def _parameters(text: str) -> list[Parameter]:
    parameters, end = [], 0
    for each in filter(str.strip, text.split(",")):
        type_ = next(name for name in re.findall(r"\.(\w+)", each) if name in TYPES)
        name, count = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", each).groups()
        size = BITS[type_] // 8
        aligned = re.search(r"\.param\s+\.align\s+(\d+)", each)
        alignment = int(aligned[1]) if aligned else size
        offset = -(-end // alignment) * alignment
        parameters.append(Parameter(name, type_, size * int(count or 1), offset))
        end = offset + parameters[-1].bytes
    return parameters


def _variable(text: str) -> Variable:
    match = _VARIABLE.search(text)
    alignment, type_, name, count = match.groups()
    size = BITS[type_] // 8
    number = count.strip("[] \t") if count else "1"
    return Variable(name, size * int(number) if number else None, int(alignment or size))


class _Body:
    """The statements of a kernel from its opening brace on; names declared in inner braces are their own."""

    def __init__(self, kernel: Kernel, text: str, start: int, lines: list[int]):
        self.kernel, self.text, self.position, self.lines = kernel, text, start, lines
        self.scopes: list[dict[str, str]] = [{}]
        self.count = self.begun = 0  # inner braces, instructions
        self.known: dict[str, object] = {}  # operands outside of inner braces

    def read(self) -> None:
        statements = []
        while self.scopes:
            statements += self._next()
        for guard, rest, text, line in statements:
            self.kernel.instructions.append(self._instruction(guard, rest, text, line))

    def _next(self) -> list:
        while self.text[self.position].isspace():
            self.position += 1
        rest = self.text[self.position]
        if rest in "{}":
            self.position += 1
            if rest == "{":
                self.count += 1
                self.scopes.append({})
            else:
                self.scopes.pop()
            return []
        label = _LABEL.match(self.text, self.position)
        if label:
            self.position = label.end()
            self.kernel.labels[self._declare(label[1])] = self.begun
            return []
        stop = "\n" if _TO_THE_END_OF_THE_LINE.match(self.text, self.position) else ";"
        end = self.text.index(stop, self.position)
        line = bisect_right(self.lines, self.position)
        statement = " ".join(self.text[self.position : end].split())
        self.position = end + 1
        if statement.startswith("."):
            self._directive(statement, line)
            return []
        if not statement:
            return []
        self.begun += 1
        return [self._parts(statement, line)]

    def _parts(self, statement: str, line: int):
        """Names are looked up where the statement stands; labels may follow, so these keep their name."""
        guard, rest = None, statement
        match = re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", statement)
        if match:
            guard, rest = Register(self._lookup(match[2]), match[1] == "!"), match[3]
        return guard, (rest, list(self.scopes)), statement, line

    def _directive(self, statement: str, line: int) -> None:
        word = statement.split()[0]
        if word == ".reg":
            _, type_, names = statement.split(None, 2)
            for name in names.split(","):
                base = re.match(r"([%\w$]+)(<\d+>)?", name.strip())
                self.kernel.registers[self._declare(base[1], prefix=bool(base[2]))] = type_[1:]
        elif word in (".shared", ".local"):
            variable = _variable(statement[len(word) :])
            getattr(self.kernel, word[1:]).append(variable._replace(name=self._declare(variable.name)))
        elif word not in (".loc", ".file", ".pragma", ".branchtargets"):
            raise PtxError(f"the directive {word} is not known", self.kernel.name, line, statement)

    def _declare(self, name: str, prefix: bool = False) -> str:
        """The name under which it is known in the kernel: its own, but for what inner braces declare."""
        own = name if len(self.scopes) == 1 or prefix else f"{name}@{self.count}"
        self.scopes[-1][name] = own
        return own

    def _lookup(self, name: str, scopes=None) -> str:
        for scope in reversed(self.scopes if scopes is None else scopes):
            if name in scope:
                return scope[name]
        return name

    def _instruction(self, guard, rest, text: str, line: int) -> Instruction:
        statement, scopes = rest
        opcode, _, operands = statement.partition(" ")
        name, *modifiers = opcode.split(".")
        try:
            parsed = tuple(self._operand(each, scopes) for each in _split(operands))
        except ValueError:
            raise PtxError("an operand is not understood", self.kernel.name, line, text) from None
        return Instruction(name, tuple(modifiers), parsed, guard, text, line)

    def _operand(self, text: str, scopes):
        if len(scopes) > 1:
            return self._new_operand(text, scopes)
        found = self.known.get(text)
        if found is None:
            found = self.known[text] = self._new_operand(text, scopes)
        return found

    def _new_operand(self, text: str, scopes):
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(each, scopes) for each in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1], scopes)
        if "|" in text:
            return Pair(*(self._operand(each, scopes) for each in text.split("|")))
        if text.startswith("!"):
            return self._operand(text[1:], scopes)._replace(negated=True)
        if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
            return Immediate(int(text[2:], 16), 32 if text[1] in "fF" else 64)
        if _INTEGER.match(text):
            return Immediate(_integer(text))
        if text in ("true", "false"):
            return Immediate(int(text == "true"))
        name = self._lookup(text, scopes)
        if name == "_" or self.kernel.register_type(name):
            return Register(name)
        if text.startswith("%"):
            return Special(text)
        if re.match(r"[\w$@]+$", name):
            return Symbol(name)
        raise ValueError(text)

    def _address(self, text: str, scopes) -> Address:
        first, *more = _split(text)
        match = re.match(r"\s*([^+]+?)\s*(?:\+\s*(-?\w+))?\s*$", first)
        offset = _integer(match[2]) if match[2] else 0
        return Address(self._operand(match[1], scopes), offset, self._operand(more[0], scopes) if more else None)


def _integer(text: str) -> int:
    digits = text.rstrip("U")
    return int(digits, 8) if re.match(r"[-+]?0[0-7]+$", digits) else int(digits, 0)


def _split(text: str) -> list[str]:
    """Operands between commas that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
