"""How PyTorch multiplies float32 numbers: as IEEE float32, or in TF32 or bfloat16, 1000 times as coarse or more.

Convolutions on a GPU use TF32 unless told otherwise. Where eager is the measure of an error, it has to be exact.
"""

import contextlib
from collections.abc import Iterator

import torch

_SETTINGS = {
    "cuda": {
        "matrix products": torch.backends.cuda.matmul,
        "convolutions": torch.backends.cudnn.conv,
        "recurrent layers": torch.backends.cudnn.rnn,
    },
    "cpu": {
        "matrix products": torch.backends.mkldnn.matmul,
        "convolutions": torch.backends.mkldnn.conv,
        "recurrent layers": torch.backends.mkldnn.rnn,
    },
}
_NAMES = {"none": "IEEE float32", "ieee": "IEEE float32", "tf32": "TF32", "bf16": "bfloat16"}


def in_force(device: str) -> str:
    """In words: "IEEE float32", or what differs, as in "matrix products IEEE float32, convolutions TF32"."""
    found = {name: _NAMES[setting.fp32_precision] for name, setting in _SETTINGS[device].items()}
    if len(set(found.values())) == 1:
        return found["convolutions"]
    return ", ".join(f"{name} {precision}" for name, precision in found.items())


@contextlib.contextmanager
def ieee() -> Iterator[None]:
    """IEEE float32 in all threads for the length of a with-block."""
    settings = [setting for of_device in _SETTINGS.values() for setting in of_device.values()]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


def use_ieee() -> None:
    """IEEE float32 from now on."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
