"""The sizes at which the up-convolutions are measured: Token Fusion's, and those of U-Net decoders."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.measure.problem import TRAINING, CaseBase, SmallCall
from tokenfusion.kernels import upconv_add, upconv_concat, upconv_concat_project

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Case(CaseBase):
    """Cp is the channels of the 1x1 convolution afterwards, 0 for none."""

    B: int
    Cin: int
    Cout: int
    Cs: int
    size: int
    k: int
    Cp: int = 0
    format: str = "nchw"
    dtype: str = "float32"
    direction: str = "forward"

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.Cp or self.Cout + self.Cs

    @property
    def memory_format(self) -> torch.memory_format:
        return FORMATS[self.format]

    def moved(self) -> int:
        """Bytes that must move: what goes in and comes out once a pass, backward with gradients in their places."""
        fine = self.B * (self.k * self.size) ** 2
        elements = self.B * self.Cin * self.size**2 + self.Cin * self.Cout * self.k**2
        elements += fine * (self.Cs + self.channels) + self.Cp * (self.Cout + self.Cs)
        return elements * self.torch_dtype.itemsize * (3 if self.backward else 1)

    def flops(self) -> int:
        """Of the composed form where there is a projection, the composition left out."""
        pixels = self.B * self.size**2 * self.k**2
        up = 2 * pixels * self.Cin * (self.Cp or self.Cout)
        return (up + 2 * pixels * self.Cs * self.Cp) * (3 if self.backward else 1)


@dataclass(frozen=True)
class Added(Case):
    """The skip connection is added, and has as many channels."""

    def __str__(self) -> str:
        return f"added-{super().__str__()}"

    @property
    def channels(self) -> int:
        return self.Cout


def _both(*cases: dict, directions=("forward", TRAINING), kind: type[Case] = Case) -> list[Case]:
    return [kind(**case, format=f, direction=d) for case in cases for f in FORMATS for d in directions]


_LATE = {"B": 16, "Cin": 768, "Cout": 768, "Cs": 768, "size": 7, "k": 2}
_UNET = {"B": 4, "Cin": 256, "Cout": 128, "Cs": 128, "size": 64, "k": 2}
_EARLY = {"B": 4, "Cin": 1024, "Cout": 4, "Cs": 0, "size": 14, "k": 16}
_DECODERS = [
    {"B": 1, "Cin": 2 * width, "Cout": width, "Cs": width, "size": size, "k": 2}
    for width, size in ((512, 16), (256, 32), (128, 64), (64, 128), (32, 256))
]
_ADDED = [_UNET, _LATE]
_PROJECTED = [_UNET | {"Cp": 64}, _LATE | {"Cp": 768}, _EARLY | {"Cp": 3}]

# The first level of a U-Net for 256 and for 512 pixels, and a deeper one.
_LARGE_DECODERS = [
    {"B": 16, "Cin": 64, "Cout": 32, "Cs": 32, "size": 128, "k": 2},
    {"B": 8, "Cin": 64, "Cout": 32, "Cs": 32, "size": 256, "k": 2},
    {"B": 16, "Cin": 256, "Cout": 128, "Cs": 128, "size": 64, "k": 2},
]


def _gpu_full(*cases: dict, kind: type[Case] = Case) -> list[Case]:
    """Four times the batch of a CPU's, in bfloat16; the forward pass of the first in float32, too."""
    half = [replace(case, B=4 * case.B, dtype="bfloat16") for case in _both(*cases, kind=kind)]
    return [*half, *(replace(case, dtype="float32") for case in half[:4] if not case.backward)]


def _gpu() -> list[Case]:
    """The headline's two, then both formats, the other operators, backward passes and float32."""
    unet, late = _LARGE_DECODERS[-1], _LATE | {"B": 64}
    projected = unet | {"Cp": unet["Cout"]}
    nhwc, nchw = ({"format": name, "dtype": "bfloat16"} for name in reversed(FORMATS))
    return [
        Case(**unet, **nhwc),
        Case(**projected, **nhwc),
        Case(**late, **nhwc),
        Added(**unet, **nhwc),
        Case(**unet, **nchw),
        Case(**unet, **nhwc, direction=TRAINING),
        Case(**projected, **nhwc, direction=TRAINING),
        Case(**unet, format="nhwc"),
    ]


_SMALL = {"B": 2, "Cin": 16, "Cout": 8, "Cs": 8, "size": 8, "k": 2}
CASES = {
    "smoke": [
        *_both(_SMALL, _SMALL | {"Cp": 8}, directions=("forward",)),
        *_both(_SMALL, directions=("forward",), kind=Added),
    ],
    "quick": [Case(**_UNET), Case(**_PROJECTED[0]), Added(**_UNET)],
    "headline": _gpu()[:2],
    "gpu": _gpu(),
    "gpu-full": [
        *_gpu_full(_LATE, *_LARGE_DECODERS, _EARLY),
        *_gpu_full(*_PROJECTED, *(case | {"Cp": case["Cout"]} for case in _LARGE_DECODERS)),
        *_gpu_full(*_ADDED, kind=Added),
    ],
    "full": [
        *_both(_LATE, _UNET, _EARLY, *_DECODERS),
        *(Case(**case, format=f, dtype="bfloat16") for case in (_LATE, _UNET, _EARLY) for f in FORMATS),
        *_both(*_PROJECTED),
        *_both(*_ADDED, kind=Added),
    ],
}


def small_calls(dtype: torch.dtype) -> Iterator[SmallCall]:
    """Calls that reach every GPU kernel: both formats, with and without skip, composed weights and not, channels, rows
    and images that are whole vectors and others."""
    for label, format, projected, has_skip, k, channels, size in (
        ("nchw", "nchw", 0, True, 2, 12, (5, 3)),
        ("nhwc", "nhwc", 0, True, 2, 12, (5, 3)),
        ("no skip", "nhwc", 0, False, 4, 12, (5, 3)),
        ("composed weights", "nchw", 4, True, 2, 12, (5, 3)),
        ("projected in the tile", "nhwc", 24, True, 2, 12, (5, 3)),
        ("whole vectors, nhwc", "nhwc", 0, True, 2, 16, (5, 3)),
        ("whole vectors, nchw", "nchw", 0, True, 2, 3, (8, 16)),
        ("whole vectors, nchw, k 4", "nchw", 0, False, 4, 3, (4, 8)),
        ("whole vectors, nchw, k 8", "nchw", 0, False, 8, 3, (2, 4)),
        ("long odd rows", "nchw", 0, True, 2, 2, (27, 29)),
    ):
        generator = torch.Generator().manual_seed(0)
        height, width = (k * length for length in size)

        def normal(*shape: int, fan_in: int = 1, generator=generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).div(fan_in**0.5).to(dtype).requires_grad_()

        def image(*shape: int, normal=normal, format=format) -> torch.Tensor:
            return normal(*shape).detach().to(memory_format=FORMATS[format]).requires_grad_()

        skip = image(2, 8, height, width) if has_skip else None
        tensors = image(2, 20, *size), normal(20, channels, k, k, fan_in=20), normal(channels), skip
        if projected:
            project = normal(projected, channels + 8, fan_in=20), normal(projected)
            yield SmallCall("upconv_concat_project", label, upconv_concat_project, (*tensors, *project))
        else:
            yield SmallCall("upconv_concat", label, upconv_concat, tensors)
        if has_skip and not projected:
            yield SmallCall("upconv_add", label, upconv_add, (*tensors[:3], image(2, channels, height, width)))
