"""Machine code of a kernel: what ptxas makes of its PTX, line by line. Nothing of it runs."""

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
_FUNCTION = re.compile(r"^(\$[\w.$]+):\n", re.MULTILINE)
_LABEL = re.compile(r"(\.[\w.$]+):")
_TARGET = re.compile(r"(?<=`\()[^)]+(?=\))|\.L_\w+")  # of a branch, and those of a branch by a table
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_ENDS = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BREAK")

# Opcodes by what executes them. The rest takes an issue slot and no pipe that can be the limit.
_PIPES = {
    "matrix": r"[HIBD]MMA|HGMMA|IGMMA|WGMMA",
    "special": r"MUFU|F2I|I2F|F2F|FRND|POPC|FLO|BREV",
    "fp32": r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2|HSET2|HSETP2|IDP",
    "alu": r"V?IADD3?|LEA|LOP3|SHF|ISETP|SEL|PRMT|FSETP|FSET|FMNMX|FSEL|V?IMNMX|IABS|F2FP|PLOP3|MOV|R2P|P2R|HMNMX2|"
    "SGXT|BMSK|I2FP",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "global": r"LDG|STG|LDGSTS|LD|ST|ATOM|ATOMG|RED|LDL|STL|UBLKCP|UTMA\w+",
    "shuffle": r"SHFL|VOTE|REDUX|MATCH|MOVM",
    "control": r"BRA|BRX|EXIT|RET|CALL|BAR|BSYNC|BSSY|WARPSYNC|NOP|LDGDEPBAR|DEPBAR|YIELD|WARPGROUP|SYNCS|FENCE|MEMBAR|"
    "ERRBAR|BREAK|NANOSLEEP|ELECT|ARRIVES|ACQBULK|JMP|CCTL|WARPGROUPSET|BMOV",
}
_PIPE_OF = {pipe: re.compile(rf"(?:{opcodes})(?:\.|$)") for pipe, opcodes in _PIPES.items()}
OTHER = "uniform and moves"
KINDS = (*_PIPES, OTHER)


@dataclass(frozen=True)
class Instruction:
    line: int  # of the PTX that it was made of
    guard: str
    opcode: str  # with its modifiers
    operands: str

    @property
    def falls_through(self) -> bool:
        conditional = self.guard or self.operands.startswith(("P", "!P", "U", "~U"))
        return not self.opcode.startswith(("BRA", "EXIT", "RET", "JMP", "BRX")) or bool(conditional)

    @functools.cached_property
    def kind(self) -> str:
        return next((pipe for pipe, opcodes in _PIPE_OF.items() if opcodes.match(self.opcode)), OTHER)


Block = tuple[Instruction, ...]  # which are run from the first to the last


@dataclass(frozen=True)
class MachineCode:
    registers: int
    spilled: int  # bytes stored and loaded, and of the stack
    shared: int  # bytes that the kernel itself declares
    blocks: tuple[Block, ...]

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]


@functools.lru_cache(maxsize=256)
def assemble(ptx: str, kernel: str, capability: int, ptxas: str, nvdisasm: str) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
        assert target.startswith(f"sm_{capability}"), target
        log = _output([ptxas, "-v", "-lineinfo", f"-arch={target}", f"--entry={kernel}", str(source), "-o", str(cubin)])
        text = _output([nvdisasm, "--print-line-info-ptx", "--print-code", str(cubin)])
    usage = re.search(rf"Compiling entry function '{kernel}'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL)[1]
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    shared = re.search(r"(\d+) bytes smem", usage)
    registers = int(re.search(r"Used (\d+) registers", usage)[1])
    blocks = _blocks(_section(text, kernel))
    return MachineCode(registers, sum(map(int, spilled.groups())), int(shared[1]) if shared else 0, blocks)


def tool(name: str, *folders: Path) -> str | None:
    """Of these folders, or of Triton, or of the path."""
    import triton

    folders = (*folders, Path(triton.__file__).parent / "backends/nvidia/bin")
    return next((found for folder in folders if (found := shutil.which(name, path=str(folder)))), shutil.which(name))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout + done.stderr


def _section(text: str, kernel: str) -> str:
    return re.search(rf"^\.text\.{re.escape(kernel)}:\n(.*?)(?=^//-----|\Z)", text, re.DOTALL | re.MULTILINE)[1]


def _blocks(text: str) -> tuple[Block, ...]:
    """Of the kernel, with what it calls in the place of the call.

    Left out is what is entered only where the lanes of a warp diverge, which are other forms of collectives, and calls
    that are the slow way of something: of a division of denormal numbers, or of integers of more than 32 bits.
    """
    kernel, *others = _FUNCTION.split(text)
    called = {name: _Code(code).instructions for name, code in zip(others[::2], others[1::2], strict=True)}
    code = _Code(kernel)
    blocks = []
    for number in code.reached():
        block = code.blocks[number]
        for target in code.targets.get(number, ()):
            block = [*block, *(replace(each, line=block[-1].line) for each in called.get(target, ()))]
        blocks.append(tuple(block))
    return tuple(filter(None, blocks))


class _Code:
    """Blocks of a function, and where each leads."""

    def __init__(self, text: str):
        self.blocks: list[list[Instruction]] = [[]]
        self.targets: dict[int, list[str]] = {}
        self._labels: dict[str, int] = {}
        line = 0
        for row in text.splitlines():
            if found := _LINE.search(row):
                line = int(found[1])
            elif found := _LABEL.match(row):
                if self.blocks[-1]:
                    self.blocks.append([])
                self._labels[found[1]] = len(self.blocks) - 1
            elif found := _INSTRUCTION.search(row):
                self.blocks[-1].append(Instruction(line, *found.groups(default="")))
                if found[2].startswith(_ENDS):
                    self.targets[len(self.blocks) - 1] = _TARGET.findall(found[3])
                    self.blocks.append([])

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block if instruction.opcode != "NOP"]

    def reached(self) -> list[int]:
        met, ahead = set(), [0]
        while ahead:
            number = ahead.pop()
            if number in met or number >= len(self.blocks) or self._is_slow_way(number):
                continue
            met.add(number)
            last = self.blocks[number][-1] if self.blocks[number] else None
            if last is None or last.falls_through:
                ahead.append(number + 1)
            if last and not last.opcode.startswith("BRA.DIV"):
                ahead += [self._labels[name] for name in self.targets.get(number, ()) if name in self._labels]
        return sorted(met)

    def _is_slow_way(self, number: int) -> bool:
        """A call behind a branch, of the same line of PTX; calls of labels within the kernel are branches."""
        block = self.blocks[number]
        if number == 0 or not block or not any(name.startswith("$") for name in self.targets.get(number, ())):
            return False
        before = self.blocks[number - 1]
        return bool(before) and before[-1].opcode.startswith("BRA") and len({each.line for each in block}) == 1
