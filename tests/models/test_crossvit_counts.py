"""Parameters and multiply-adds of CrossViT, row by row of Tables 1, 2, 4, 6 and 7 of arXiv:2103.14899.

The expected numbers were counted in the official code (a fusion of Table 6 has none: in the structure that fits both
printed numbers). `printed` is the paper's, in millions and in G multiply-adds ("FLOPs").
"""

import pytest
import torch
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion

PREFIX = "tokenfusion_crossvit_"


@pytest.fixture(autouse=True)
def counted_attention():
    """Attention as two products, which the counter sees."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def counts(name: str, unfused: bool = True, **options) -> tuple[int, int, float]:
    """Parameters, those without positions and class tokens, and G multiply-adds for one image."""
    with torch.device("meta"):
        model = tokenfusion.create_model(PREFIX + name, **options).eval()
    if unfused:
        tokenfusion.unfuse(model)  # keys and values are projected, as the paper counts
    total = sum(parameter.numel() for parameter in model.parameters())
    positions = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), tokenfusion.backend("reference"):
        model(torch.empty(1, 3, *model.img_size, device="meta"))
    return total, total - positions, counter.get_total_flops() / 2e9


# Table 1, 2 and 4: Ti, S, B and 15 print the count without positions and class tokens, the others the full one.
ROWS = {
    "tiny_240": (7_014_800, 6_938_192, 1.563, (6.9, 1.6)),
    "small_240": (26_856_272, 26_703_056, 5.616, (26.7, 5.6)),
    "base_240": (105_025_232, 104_718_800, 21.191, (104.7, 21.2)),
    "9_240": (8_553_296, None, 1.841, (8.6, 1.8)),
    "15_240": (27_528_464, 27_375_248, 5.791, (27.4, 5.8)),
    "18_240": (43_271_408, None, 9.031, (43.3, 9.0)),
    "9_dagger_240": (8_776_592, None, 1.979, (8.8, 2.0)),
    "15_dagger_240": (28_209_008, None, 6.112, (28.2, 6.1)),
    "18_dagger_240": (44_266_976, None, 9.473, (44.3, 9.5)),
    "15_dagger_408": (28_500_080, None, 21.399, (28.5, 21.4)),
    "18_dagger_408": (44_606_560, None, 32.409, (44.6, 32.4)),
    "18_dagger_504": (44_887_904, None, 56.602, (44.9, 56.6)),
}


@pytest.mark.parametrize("name", ROWS)
def test_tables_1_2_and_4(name):
    parameters, without_positions, multiply_adds, printed = ROWS[name]
    assert set(tokenfusion.list_models(PREFIX + "*")) == {PREFIX + name for name in ROWS}
    total, nopos, macs = counts(name)
    assert total == parameters
    assert without_positions in (nopos, None)
    assert macs == pytest.approx(multiply_adds, abs=6e-4)
    assert (round((without_positions or parameters) / 1e6, 1), round(macs, 1)) == printed


# Table 7 prints counts without positions and class tokens; those of E are 0.005 M above the printed 31.1.
ABLATIONS = {
    "A: patches of 8 and 16": (
        {"patch_size": (8, 16), "img_scale": (224 / 240, 224 / 240)},
        (26_883_920, 26_656_976, 6.731, (26.7, 6.7)),
    ),
    "B: equal widths": ({"embed_dim": (384, 384)}, (31_633_232, 31_402_832, 7.697, (31.4, 7.7))),
    "C: N = 2": ({"depth": ((2, 4, 0),) * 3}, (28_190_864, 28_037_648, 6.333, (28.0, 6.3))),
    "D: L = 2": ({"depth": ((1, 4, 2),) * 3}, (29_078_480, 28_925_264, 5.618, (28.9, 5.6))),
    "E: K = 6, M = 2": ({"depth": ((1, 2, 0),) * 6}, (31_308_176, 31_154_960, 6.599, (31.15, 6.6))),
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_table_7(row):
    options, (parameters, without_positions, multiply_adds, printed) = ABLATIONS[row]
    total, nopos, macs = counts("small_240", **options)
    assert (total, nopos) == (parameters, without_positions)
    assert macs == pytest.approx(multiply_adds, abs=6e-4)
    assert nopos / 1e6 == pytest.approx(printed[0], abs=0.051)
    assert round(macs, 1) == printed[1]


# Table 6 prints full counts, but for cross-attention. All-attention is Eq. 2 as printed, without an FFN: 0.89 M fewer
# than the printed 27.7 M, at the printed multiply-adds.
FUSIONS = {
    "none": (23_738_960, 5.34966, (23.7, 5.3)),
    "all_attention": (26_854_544, 7.58341, (26.9, 7.6)),
    "class_token": (24_186_512, 5.35011, (24.2, 5.4)),
    "pairwise": (24_186_512, 5.52705, (24.2, 5.5)),
    "cross_attention": (26_856_272, 5.616, (26.9, 5.6)),
}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_table_6(fusion):
    parameters, multiply_adds, printed = FUSIONS[fusion]
    total, _, macs = counts("small_240", fusion=fusion)
    assert total == parameters
    assert macs == pytest.approx(multiply_adds, abs=6e-4 if fusion == "cross_attention" else 6e-6)
    assert (round(total / 1e6, 1), round(macs, 1)) == printed


def test_without_class_tokens():
    assert counts("small_240", class_token=False)[0] == 26_856_272 - 2 * (192 + 384)


def test_fused_cross_attention_saves_the_keys_and_values():
    """4 N C^2 of K and V in each of the six fusions, less what the absorbed form takes."""
    keys_and_values = 3 * 2 * (197 * 384**2 + 401 * 192**2) / 1e9
    saved = counts("small_240")[2] - counts("small_240", unfused=False)[2]
    assert 0.9 * keys_and_values < saved < keys_and_values
