"""The calls that `tokenfusion tune` measures where no model is named: those of the four families, at usual sizes."""

import itertools
from collections.abc import Iterator

from tokenfusion.kernels.choices import Workload

_DTYPES = ("float32", "bfloat16")
_TRAINED = "tokens with a gradient"


def _of(dtype: str) -> Iterator[Workload]:
    for sizes in ((1, 401, 384, 6), (64, 401, 384, 6), (8, 197, 192, 6), (32, 1024, 768, 12), (1, 20000, 1024, 8)):
        yield Workload("single_query_attention", (dtype, "inference"), sizes)
        yield Workload("single_query_attention", (dtype, "training"), sizes)
    for sizes in ((8, 401, 384, 6), (64, 401, 384, 6)):
        yield Workload("single_query_attention", (dtype, "training", _TRAINED), sizes)
    for sizes in ((197, 384, 1536), (3152, 384, 1536), (1576, 768, 3072)):
        for direction in ("inference", "training"):
            yield Workload("tied_ffn", (dtype, direction), sizes)
    for words in ("rows", "columns"):
        for direction in ("inference", "training"):
            yield Workload("dynamic_mixing", (dtype, direction, words), (8, 32, 32, 192, 8, 2))
            yield Workload("dynamic_mixing", (dtype, direction, words), (8, 16, 16, 384, 16, 2))
    for words in ("contiguous", "channels_last"):
        for direction in ("inference", "training"):
            for sizes in ((8, 768, 768, 49), (4, 256, 128, 4096), (2, 64, 32, 16384)):
                yield Workload("upconv_concat", (dtype, direction, "k 2", words), sizes)
            for sizes in ((8, 768, 768, 49), (4, 256, 128, 4096)):
                yield Workload("upconv_add", (dtype, direction, "k 2", words), sizes)
            for sizes in ((8, 768, 768, 768, 49, 768), (4, 256, 128, 64, 4096, 128)):
                yield Workload("upconv_concat_project", (dtype, direction, "k 2", words), sizes)
    for sizes in ((8, 1024, 576, 192, 3), (8, 256, 1152, 384, 3)):
        yield Workload("gated_sum", (dtype, "inference", "projected"), sizes)
        yield Workload("gated_sum", (dtype, "training"), sizes)
    for rows in (256, 1600, 6400):
        for channels, features in ((192, 192), (192, 576), (576, 192), (384, 384), (384, 1152), (1152, 384)):
            yield Workload("linear", (dtype, "inference"), (rows, channels, features))
            if features > channels:
                yield Workload("linear", (dtype, "inference", "gelu"), (rows, channels, features))
    yield from _of_one_image(dtype)


def _of_one_image(dtype: str) -> Iterator[Workload]:
    """Inference of a single image where its products are too small to be compared with those of a batch."""
    for tokens, side, channels, segments in ((1024, 32, 192, 8), (256, 16, 384, 16)):
        yield Workload("gated_sum", (dtype, "inference", "projected"), (1, tokens, 3 * channels, channels, 3))
        for words in ("rows", "columns"):
            sizes = (1, side, side, channels, segments, 2)
            yield Workload("dynamic_mixing", (dtype, "inference", words), sizes)
    for words in ("contiguous", "channels_last"):
        for sizes in ((1, 768, 768, 49), (1, 256, 128, 1024)):
            yield Workload("upconv_concat", (dtype, "inference", "k 2", words), sizes)
        yield Workload("upconv_concat_project", (dtype, "inference", "k 2", words), (1, 2048, 768, 768, 49, 768))
    for scale, inputs, pixels in ((2, 64, 12544), (4, 256, 3136), (8, 512, 784), (16, 1024, 196), (32, 2048, 49)):
        words = (f"k {scale}", "contiguous", "no skip")
        yield Workload("upconv_concat_project", (dtype, "inference", *words), (1, inputs, 4, 3, pixels, 1))


_BFLOAT16 = "bfloat16", "inference"
_OF_BFLOAT16 = (
    *(
        Workload("attention", _BFLOAT16, (6 * batch, *sizes))
        for batch in (1, 8)
        for sizes in ((401, 401, 32), (197, 197, 64))
    ),
    *(Workload("mlp", _BFLOAT16, (rows, c, 3 * c, c)) for rows in (256, 1600, 6400) for c in (192, 384)),
)
_OF_BOTH_DTYPES = itertools.chain.from_iterable(zip(*map(_of, _DTYPES), strict=True))  # in a short time of both
WORKLOADS = (*_OF_BOTH_DTYPES, *_OF_BFLOAT16)
