"""The calls that have every Triton kernel run in every dtype, direction and shipped tile: few tokens, real channels.

Tiles do not depend on the GPU, and code for matrix units hardly depends on what the 16 bits of a number mean. So the
tiles of 16 bits are gone through in bfloat16 for sm_90 and in float16 for sm_80. Each kernel meets
the other pairs once.
"""

from tests.ptx.triton_calls import Call

TARGETS = {"bfloat16": 90, "float16": 80, "float32": 90}  # dtype: the GPU for which it meets every tile
OTHERS = {"bfloat16": 80, "float16": 90, "float32": 80}
KERNELS = {  # what every call of a group launches
    "single_query_attention": {"forward_kernel"},
    "wide": {"scores_kernel", "log_sum_exp_kernel", "sum_kernel"},
    "tied_ffn": {"hidden_backward_kernel", "linear_kernel", "grad_weight_kernel"},
    "dynamic_mixing": {"forward_kernel", "grad_x_kernel", "grad_compressed_kernel", "grad_weight_kernel"},
    "upconv": {"forward_kernel", "grad_x_kernel", "grad_weight_kernel"},
}
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "identity")


def _attention(
    channels: int, queries: int = 6, tokens: int = 70, tile_of: int = 0, operator: str = "single_query_attention"
) -> dict:
    """One program takes three blocks of tokens. tile_of: channels whose tile it takes, so that fewer are compiled."""
    sizes = dict(batch=1, queries=queries, tokens=tokens, channels=channels, extra=True)
    return dict(operator=operator, arguments=sizes, host=dict(MAX_SPLITS=1), tile_of=tile_of)


def _tied(channels: int, features: int, tokens: int, **options) -> dict:
    """The gradient of the weight is summed over no more tokens at a time than there are here."""
    sizes = dict(tokens=tokens, channels=channels, features=features)
    return dict(operator="tied_ffn", arguments=sizes | options, host=dict(ROWS_PER_SPLIT=64))


def _in_form(form: str, *calls: dict) -> list[dict]:
    return [call | dict(form=form) for call in calls]


def _mixing(length: int, channels: int, segments: int, reduced: int, operator="dynamic_mixing", dim=1, lines=2) -> dict:
    height, width = (length, lines) if dim == 1 else (lines, length)
    sizes = dict(batch=1, height=height, width=width, channels=channels)
    return dict(operator=operator, arguments=sizes | dict(segments=segments, reduced=reduced, dim=dim))


def _upconv(op, channels, size, scale=2, formats="nchw", batch=1, **options) -> dict:
    formats = (formats,) * 4 if isinstance(formats, str) else formats
    sizes = dict(op=op, batch=batch, channels=channels, size=size, scale=scale, formats=formats)
    return dict(operator="upconv", arguments=sizes | options)


def _with(call: dict, host: dict | None = None, **arguments) -> dict:
    return call | dict(arguments=call["arguments"] | arguments, host=call.get("host", {}) | (host or {}))


_SMALL_BLOCKS = dict(tokens=40)
_WIDE = dict(MAX_CHANNELS_ON_CHIP=0)  # few channels as many are taken
_UPCONVS = [
    _upconv(op, (96, 40, 24), (7, 7), formats=f, batch=2, projected=48)
    for op in ("concat", "project")
    for f in ("nchw", "nhwc")
]
_16_BITS = {
    "single_query_attention": [
        *(_attention(c, q) for c in (48, 64, 96, 128) for q in (6, 24)),
        *(_attention(c, q, 40, of) for c, of in {48: 144, 64: 192, 96: 224, 128: 256}.items() for q in (6, 24)),
        *(_attention(c, 12, 40, of) for c, of in {48: 272, 64: 448, 96: 288, 128: 384, 256: 768}.items()),
        *(_attention(c, 12, 40, of, "attended") for c, of in {64: 832, 96: 800, 128: 896, 256: 1024}.items()),
    ],
    "wide": [_with(_attention(400, 16, **_SMALL_BLOCKS), _WIDE)],
    "tied_ffn": [_tied(c, 100, 70) for c in (16, 32, 64, 96)]
    + [_tied(384, 256, 150)]
    + [call for form in ("small", "deep") for call in _in_form(form, _tied(384, 256, 150))],
    "dynamic_mixing": [
        _mixing(32, 192, 8, 2),
        _mixing(16, 384, 16, 2, "mixing_and_mean"),
        _mixing(32, 96, 8, 2),
        _mixing(14, 48, 4, 2),
        _mixing(7, 24, 4, 1),
        _mixing(7, 72, 3, 2),
        _mixing(64, 48, 4, 1),
    ],
    "upconv": [*_UPCONVS, *_in_form("deep", *_UPCONVS)],
}
_32_BITS = {
    "single_query_attention": [
        *(_attention(c, q, 40) for c in (48, 64, 96) for q in (6, 24)),
        *(_attention(c, q, 40, of) for c, of in {48: 208, 64: 256, 96: 224}.items() for q in (6, 24)),
        *(_attention(c, 12, 40, of) for c, of in {48: 272, 64: 448, 96: 288, 128: 768}.items()),
    ],
    "wide": [_with(_attention(400, 16, **_SMALL_BLOCKS), _WIDE)],
    "tied_ffn": [_tied(c, 40, 40) for c in (16, 32, 64, 96)] + [_tied(160, 72, 70)],
    "dynamic_mixing": [
        _mixing(32, 96, 4, 2),
        _mixing(16, 48, 4, 2, "mixing_and_mean", dim=2, lines=3),
        _mixing(40, 24, 2, 1),
    ],
    "upconv": [
        _upconv(op, (48, 20, 12), (5, 5), formats=f, projected=24)
        for op in ("concat", "project")
        for f in ("nchw", "nhwc")
    ],
}
_ONCE = {
    "single_query_attention": [_with(_attention(192, tokens=100), dict(MAX_SPLITS=2))],
    "wide": [_with(_attention(272, 4, **_SMALL_BLOCKS), _WIDE)],
    "tied_ffn": [_tied(96, 100, 70), _tied(136, 72, 70)],
    "dynamic_mixing": [_mixing(16, 96, 4, 2)],
    "upconv": [_upconv("concat", (48, 20, 12), (5, 5)), _upconv("project", (48, 20, 12), (5, 5), projected=24)],
}
_BAGS = dict(bags=(40, 0, 17), queries=3, channels=24)
_PADDED = dict(lengths=(33, 0, 70), queries=3, tokens=70, channels=24)


def _bags(extra: bool, operator: str = "packed", **options) -> dict:
    sizes = _BAGS if operator == "packed" else _PADDED
    return dict(operator=operator, arguments=sizes | dict(extra=extra) | options)


_BAGS_OF_ALL_KINDS = [
    _bags(True, "padded"),
    _bags(False, "padded", normalize=False),
    _bags(True),
    _bags(False, lengths=(33, 0, 17)),
]
_FEW_NEEDED = [
    _with(_attention(24, 3), needed=n) for n in ((True, False, False), (False, True, False), (False, False, True))
]
_SPLIT = [
    _with(_attention(24, 3, tokens), dict(MAX_SPLITS=splits))
    for splits, tokens in {2: 40, 4: 70, 8: 230, 16: 450, 32: 900}.items()
]
_OPTIONS = {
    "single_query_attention": [
        *((each, "bfloat16", 90) for each in _BAGS_OF_ALL_KINDS + _FEW_NEEDED),
        (_with(_attention(24, 3), extra=False, normalize=False), "bfloat16", 90),
        (_with(_attention(24, 3), first=4), "bfloat16", 90),
        (_with(_attention(96, 12), first=1), "float16", 80),
        (_attention(40, 40), "bfloat16", 90),
        (_attention(264, 40, 40), "float32", 90),
        *((_attention(c, 12), "bfloat16", 90) for c in (192, 384, 768, 1024)),
        *((_attention(c, 6, 40), "float32", 90) for c in (192, 384)),
        (_attention(384, 12), "float16", 80),
        *((each, dtype, TARGETS[dtype]) for dtype in TARGETS for each in _SPLIT),
    ],
    "wide": [
        *((_with(each, _WIDE), "float16", 80) for each in _BAGS_OF_ALL_KINDS + _FEW_NEEDED),
        (_attention(4096, 16, 40), "bfloat16", 90),
        (_with(_attention(136, 20), _WIDE, extra=False, normalize=False), "bfloat16", 90),
        (_with(_attention(136, 20), _WIDE, first=4), "bfloat16", 90),
        (_with(_attention(136, 20, 70), _WIDE | dict(MAX_SPLITS=2)), "float16", 90),
    ],
    "tied_ffn": [
        *((_tied(24, 50, 70, activation=a), "float32", 80) for a in ACTIVATIONS),
        *((_tied(136, 72, 70, activation=a, recompute=False), "bfloat16", 90) for a in ACTIVATIONS),
        (_tied(24, 50, 70, biases=(False, False)), "bfloat16", 90),
        (_tied(136, 72, 70, biases=(False, False)), "float16", 80),
        (_tied(7, 13, 33), "bfloat16", 90),
        (_tied(1, 1, 1), "float32", 90),
        (_tied(130, 70, 150), "float16", 90),
    ],
    "dynamic_mixing": [
        (_mixing(20, 32, 1, 16, dim=2), "bfloat16", 90),
        (_mixing(33, 30, 2, 3, dim=2), "bfloat16", 90),
        (_mixing(1, 24, 6, 2), "bfloat16", 90),
    ],
    "upconv": [
        *((_upconv("concat", (33, 6, 3), (3, 3), 4, f), "bfloat16", 90) for f in ("nchw", "nhwc")),
        *((_upconv("concat", (40, 6, 3), (3, 3), 8, f), "float16", 80) for f in ("nchw", "nhwc")),
        *((_upconv("concat", (64, 4, 4), (5, 5), 16, f), "float32", 90) for f in ("nchw", "nhwc")),
        (_upconv("concat", (20, 12, 8), (5, 5), bias=False, skip_first=True), "float16", 80),
        (_upconv("concat", (33, 12, 0), (5, 5), formats=("nchw", "nhwc", "nchw", "nhwc")), "bfloat16", 90),
        (_upconv("project", (33, 12, 0), (5, 5), formats=("nhwc", "nchw", "nhwc", "nchw"), bias=False), "bfloat16", 90),
        (_upconv("project", (33, 12, 8), (3, 3), 4, composes=True), "float16", 80),
        *((_upconv("add", (40, 24, 24), (5, 5), formats=f), "bfloat16", 90) for f in ("nchw", "nhwc")),
    ],
}
GROUPS = tuple(KERNELS)


def tiles(group: str, dtype: str) -> list[tuple[Call, int]]:
    """Calls that reach every tile in this dtype, and the GPU for each."""
    calls = (_32_BITS if dtype == "float32" else _16_BITS)[group]
    return [(Call(dtype=dtype, **each), TARGETS[dtype]) for each in calls] + once(group, dtype, OTHERS[dtype])


def once(group: str, dtype: str, capability: int) -> list[tuple[Call, int]]:
    """Calls that reach every kernel."""
    return [(Call(dtype=dtype, **each), capability) for each in _ONCE[group]]


def options(group: str) -> list[tuple[Call, int]]:
    """Calls that reach every option of the kernels."""
    return [(Call(dtype=dtype, **each), capability) for each, dtype, capability in _OPTIONS[group]]


def everything_of(group: str) -> list[tuple[Call, int]]:
    return [each for dtype in TARGETS for each in tiles(group, dtype)] + options(group)


def everything() -> list[tuple[Call, int]]:
    return [each for group in GROUPS for each in everything_of(group)]
