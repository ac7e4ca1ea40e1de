"""Kernels by tiles, which load 64 bytes at a time, read nothing beyond operands that end where memory does."""

import sys

import pytest

from tokenfusion.kernels import extension

PROGRAM = """
import ctypes, mmap, torch

def at_the_end(tensor):
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - tensor.nbytes)
    return placed.view(tensor.shape).copy_(tensor)

def check(operator, *operands):
    ends = [at_the_end(tensor) for tensor in operands]
    assert torch.equal(operator(*ends), operator(*operands))

def made(*sizes):
    return torch.randn(sizes, dtype=torch.bfloat16)

for tokens, channels in ((37, 20), (17, 33), (64, 64)):
    operands = (made(1, 2, tokens, channels) for _ in "qkv")
    check(lambda q, k, v: torch.ops.tokenfusion.attention_cpu(q, k, v, 0.2), *operands)
for rows, channels, features, outputs in ((37, 20, 50, 33), (17, 33, 40, 20), (64, 64, 64, 64)):
    operands = made(rows, channels), made(features, channels), made(features), made(outputs, features), made(outputs)
    check(torch.ops.tokenfusion.mlp_cpu, *operands)
"""


@pytest.mark.skipif(not extension.amx_allowed(), reason="no AMX here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is protected by Linux's mprotect")
def test_nothing_beyond_is_read(run_python):
    run_python("import tokenfusion\n" + PROGRAM)
