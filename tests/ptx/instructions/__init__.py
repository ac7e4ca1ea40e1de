"""What each instruction does, one file a group. Importing this declares all of them."""

from . import (  # noqa: F401
    approximate,
    control,
    conversions,
    copies,
    floating,
    integers,
    loads,
    logic,
    matrices,
    moves,
    warps,
    wgmma,
)
