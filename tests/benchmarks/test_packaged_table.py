"""The table of the package is made of what gains in several runs."""

import json

import pytest

from benchmarks import packaged_table
from tokenfusion.tuning import files


def entry(choice: str, length: int = 50, **seconds: float) -> dict:
    return {
        "operator": "single_query_attention",
        "kind": ["float32", "inference"],
        "sizes": [2, length, 32, 3],
        "choice": choice,
        "built_in": "cpu",
        "seconds": {"cpu": 1.0, **seconds},
        "wrong": {},
    }


@pytest.mark.parametrize(
    "runs, choice",
    [
        ([{"few": 0.9}, {"few": 0.8}], "few"),
        ([{"few": 0.9}, {"few": 0.98}], "cpu"),  # too small a gain to be sure of
        ([{"few": 0.9}, {"reference": 0.9}], "cpu"),
        ([{"few": 0.8, "reference": 0.81}, {"reference": 0.78, "few": 0.8}], "few"),
        ([{}, {}], "cpu"),
    ],
)
def test_what_gains_in_all_runs_is_the_choice(tmp_path, capsys, runs, choice):
    paths = [tmp_path / f"{i}.json" for i in range(len(runs))]
    for path, seconds in zip(paths, runs, strict=True):
        files.write(path, [entry(min(seconds, default="cpu"), **seconds), entry("cpu", length=len(path.parts))])
    out = tmp_path / "table.json"
    packaged_table.main([*map(str, paths), "--out", str(out)])
    assert {found["sizes"][1]: found["choice"] for found in files.read(out)} == {50: choice, len(out.parts): "cpu"}
    assert f"2 choices, of which {int(choice != 'cpu')} are not" in capsys.readouterr().out


def test_what_one_run_lacks_is_left_out():
    skipped = entry("cpu") | {"choice": None, "seconds": {}, "skipped": "no memory"}
    assert packaged_table.joined([[entry("cpu"), entry("cpu", length=9)], [skipped, entry("cpu", length=9)]]) == [
        entry("cpu", length=9)
    ]


def test_no_table_is_made_where_a_kernel_is_wrong(tmp_path):
    path = tmp_path / "run.json"
    files.write(path, [entry("cpu") | {"wrong": {"reference": "relative error"}}])
    with pytest.raises(ValueError, match="relative error"):
        packaged_table.main([str(path), "--out", str(tmp_path / "table.json")])
    assert json.loads(path.read_text())["entries"] and not (tmp_path / "table.json").exists()
