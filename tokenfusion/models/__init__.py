"""The package's own models, registered with timm: `timm.create_model` finds them once this module is imported.

The class of each family has a file, and the registration of its models is in `<family>_entrypoints.py` or in the same
file. One that registers must not have the base name of a file of timm's.
"""

from tokenfusion.models import (  # noqa: F401  (they register their models)
    crossvit_entrypoints,
    dynamixer_entrypoints,
    resnet_pe,
    token_fusion_entrypoints,
    vit_pe,
)
from tokenfusion.models.checkpoints import load_checkpoint
from tokenfusion.models.factory import create_model, list_models

__all__ = ["create_model", "list_models", "load_checkpoint"]
