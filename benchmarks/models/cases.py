"""The models, batches and passes that are measured. A further model is a line of FAMILIES."""

from dataclasses import dataclass

from benchmarks.measure.problem import FORWARD, CaseBase

TRAINING = "training step"

# Group of models -> names. A model in which `fuse` replaces nothing is skipped.
FAMILIES = {
    "CrossViT models of timm": ("crossvit_tiny_240", "crossvit_15_240", "crossvit_9_240", "crossvit_18_240"),
    "CaiT models of timm": ("cait_xxs24_224",),
    "XCiT models of timm": ("xcit_tiny_12_p16_224",),
    "VOLO models of timm": ("volo_d1_224",),
    "ViT models of timm with attention pooling (SigLIP)": ("vit_base_patch16_siglip_224",),
    "ResNet models of timm with attention pooling (CLIP)": ("resnet50_clip",),
    "DynaMixer models, eager is the authors' form": ("dynamixer_m", "dynamixer_s"),
}
_BATCHES = (64, 1, 8, 32, 16, 4, 2)


@dataclass(frozen=True)
class Case(CaseBase):
    """One model. In bfloat16 the forward pass has weights in bfloat16, and a training step runs under autocast."""

    model: str
    B: int
    dtype: str = "float32"
    direction: str = FORWARD

    @property
    def group(self) -> str:
        return next(group for group, models in FAMILIES.items() if self.model in models)

    @property
    def training(self) -> bool:
        return self.direction == TRAINING


def _passes(model: str, batch: int, dtypes=("bfloat16", "float32")) -> list[Case]:
    return [Case(model, batch, dtype, direction) for dtype in dtypes for direction in (FORWARD, TRAINING)]


_FIRST = "crossvit_15_240"
_OTHERS = [model for models in FAMILIES.values() for model in models[-1:]]
_SWEEP = [case for batch in _BATCHES for case in _passes(_FIRST, batch)]
_ALL = [model for models in FAMILIES.values() for model in models if model != "crossvit_tiny_240"]

CASES = {
    "smoke": [Case("crossvit_tiny_240", 2), Case("crossvit_tiny_240", 2, direction=TRAINING)],
    "quick": [Case(_FIRST, 4), *(Case(model, 1) for model in _OTHERS[1:])],
    "full": list(dict.fromkeys([*_SWEEP, *(case for m in _ALL for b in (1, 8, 16, 64) for case in _passes(m, b))])),
    "gpu": [*_SWEEP[:2], *_passes("dynamixer_s", 64, ("bfloat16",))[:1]],
    "gpu-full": [
        *_SWEEP[:4],
        *(case for batch in (64, 256) for m in _OTHERS for case in _passes(m, batch, ("bfloat16",))),
        *_SWEEP[4:],
    ],
}
