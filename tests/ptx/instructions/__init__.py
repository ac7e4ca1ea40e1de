"""What each instruction does, one file a group. Importing this declares all of them."""

from . import (  # noqa: F401
    approximate,
    bulk,
    control,
    conversions,
    copies,
    floating,
    integers,
    loads,
    logic,
    matrices,
    mbarriers,
    moves,
    warps,
    wgmma,
)
