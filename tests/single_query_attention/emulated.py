"""The CUDA kernels of single_query_attention on a CPU, in the emulated GPU of tests/cuda_emulation."""

import ctypes
import functools
from dataclasses import dataclass

import torch

from tests.emulation import DTYPES, Guarded, compile_library


class _Params(ctypes.Structure):
    """SingleQueryAttentionParams."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("query_batch_stride", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("tokens_batch_stride", ctypes.c_int64),
        ("tokens_stride", ctypes.c_int64),
        ("extra_token", ctypes.c_void_p),
        ("extra_token_stride", ctypes.c_int64),
        ("batch", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("queries", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("eps", ctypes.c_float),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "context",
                "log_sum_exp",
                "partial_context",
                "partial_max",
                "partial_sum",
                "grad_context",
                "grad_query",
                "partial_grad_query",
                "grad_tokens",
                "grad_extra_token",
            )
        ),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = compile_library("single_query_attention")
    library.plan_single_query_attention.restype = ctypes.c_int64
    return library


def planned_bytes(channels: int, queries: int, rows: int, dtype: torch.dtype, backward: bool, most: int) -> int:
    """Shared memory of the block that is launched where there are `most` bytes."""
    params = _Params(channels=channels, queries=queries, rows=rows, splits=1)
    arguments = ctypes.byref(params), DTYPES.index(dtype), int(backward), ctypes.c_int64(most)
    return _library().plan_single_query_attention(*arguments)


def first_tiles(rows: int, splits: int) -> list[int]:
    """The first tile of 16 rows of each of the blocks that share an image, and where the last one ends."""
    params = _Params(rows=rows, splits=splits)
    return [_library().first_tile_single_query_attention(ctypes.byref(params), split) for split in range(splits + 1)]


@dataclass
class Emulated:
    """single_query_attention on the emulated GPU, with the way in which a launch is cut up and scheduled.

    splits: blocks an image; groups, stages: of a block, 0 as the plan has them. backwards: the last thread runs first;
    one_warp_ahead: a warp runs as far as it can before the next one starts; late_copies: asynchronous copies happen
    when they are waited for, not at once.
    """

    splits: int = 1
    groups: int = 0
    stages: int = 0
    backwards: bool = False
    one_warp_ahead: bool = False
    late_copies: bool = False

    def __call__(self, query, tokens, extra_token=None, *, normalize=False, eps=1e-6):
        return _Function.apply(self, query, tokens, extra_token, normalize, eps)

    def launch(self, backward: bool, query, tokens, extra_token, normalize, eps, **outputs) -> None:
        batch, length, channels = tokens.shape
        pointers = {name: None if t is None else t.data_ptr() for name, t in outputs.items()}
        params = _Params(
            query=query.data_ptr(),
            query_batch_stride=query.stride(0),
            query_stride=query.stride(1),
            tokens=tokens.data_ptr(),
            tokens_batch_stride=tokens.stride(0),
            tokens_stride=tokens.stride(1),
            extra_token=None if extra_token is None else extra_token.data_ptr(),
            extra_token_stride=0 if extra_token is None else extra_token.stride(0),
            batch=batch,
            rows=length + (extra_token is not None),
            channels=channels,
            queries=query.shape[1],
            splits=self.splits,
            normalize=normalize,
            eps=eps,
            **pointers,
        )
        schedule = self.backwards, self.one_warp_ahead, self.late_copies
        dtype = DTYPES.index(tokens.dtype)
        _library().run_single_query_attention(
            ctypes.byref(params), dtype, int(backward), self.groups, self.stages, *map(int, schedule)
        )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, emulated, query, tokens, extra_token, normalize, eps):
        batch, queries, channels = query.shape
        guarded = Guarded()
        context = guarded.empty(batch, queries, channels, dtype=tokens.dtype)
        lse = guarded.empty(batch, queries, dtype=torch.float32)
        partial = [
            guarded.empty(batch, emulated.splits, queries, size, dtype=torch.float32) for size in (channels, 1, 1)
        ]
        emulated.launch(
            False,
            query,
            tokens,
            extra_token,
            normalize,
            eps,
            context=context,
            log_sum_exp=lse,
            partial_context=partial[0],
            partial_max=partial[1],
            partial_sum=partial[2],
        )
        guarded.check()
        ctx.save_for_backward(query, tokens, extra_token, context, lse)
        ctx.options = emulated, normalize, eps
        return context.clone()

    @staticmethod
    def backward(ctx, grad_context):
        query, tokens, extra_token, context, lse = ctx.saved_tensors
        emulated, normalize, eps = ctx.options
        guarded = Guarded()
        _, *needed, _, _ = ctx.needs_input_grad
        grads = [
            guarded.empty(*t.shape, dtype=t.dtype) if wanted else None
            for t, wanted in zip((query, tokens, extra_token), needed, strict=True)
        ]
        shape = query.shape[0], emulated.splits, *query.shape[1:]
        emulated.launch(
            True,
            query,
            tokens,
            extra_token,
            normalize,
            eps,
            context=context,
            log_sum_exp=lse,
            grad_context=grad_context.contiguous(),
            grad_query=grads[0],
            partial_grad_query=guarded.empty(*shape, dtype=torch.float32),
            grad_tokens=grads[1],
            grad_extra_token=grads[2],
        )
        guarded.check()
        return None, *(None if g is None else g.clone() for g in grads), None, None
