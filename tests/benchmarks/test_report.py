"""The report of a record: page, plots, tables for the README."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.measure import environment
from benchmarks.report import __main__ as report
from benchmarks.report import html, markdown, record, summary, table


def _row(variant: str, backend: str | None, length: int, seconds: float, **changes) -> dict:
    row = {
        "group": "some layer",
        "case": {"B": 8, "N": length, "dtype": "float32", "direction": "forward"},
        "variant": variant,
        "backend": backend,
        "fault": None,
        "peak_bytes": 1000 * length,
        "moved_bytes": 400 * length,
        "flops": 100 * length,
        "error": 1e-7,
        "allowed_error": 5e-7,
        "seconds": seconds,
        "quartiles": [0.9 * seconds, 1.1 * seconds],
        "rounds": 9,
        "times_eager": 1.5,
        "times_compiled": None,
        "bytes_per_second": 1e9,
        "flops_per_second": 1e9,
        "memory_ceiling_seconds": seconds / 2,
        "arithmetic_ceiling_seconds": seconds / 4,
        "share_of_ceiling": 0.5,
    }
    return row | changes


def _failed(row: dict) -> dict:
    measured = ("peak_bytes", "error", "allowed_error")
    timed = list(row)[list(row).index("seconds") :]
    fault = {"fault": "RuntimeError: <out of luck>", **dict.fromkeys(measured)}
    return {name: value for name, value in row.items() if name not in timed} | fault


@pytest.fixture
def synthetic_record(tmp_path) -> Path:
    rows = [
        row
        for length in (65, 401, 4097)
        for row in (
            _row("eager", None, length, 1e-5 * length),
            _failed(_row("projections + SDPA", None, length, 1e-5 * length)),
            _row("tokenfusion (cuda)", "cuda", length, 1e-6 * length),
        )
    ]
    facts = environment.collect("smoke")
    facts["device"] |= {"kind": "cuda", "name": "Some GPU", "driver": "1.2.3"}
    return record.save(tmp_path / "record.json", {"conditions": facts, "rows": rows})


def test_report_makes_plots_and_one_page(synthetic_record, tmp_path, capsys):
    report.main([str(synthetic_record), "--out", str(tmp_path / "report"), "--markdown"])
    files = {path.name for path in (tmp_path / "report").iterdir()}
    plots = {f"some-layer-{name}.png" for name in ("speed-ups", "time-against-n", "memory-against-n")}
    assert files == {*plots, "report.html"}
    page = (tmp_path / "report" / "report.html").read_text()
    ElementTree.fromstring(page.removeprefix("<!doctype html>"))
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "Some GPU" in page and "1.2.3" in page
    assert "&lt;out of luck&gt;" in page
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert lines[-1].startswith("| B 8, N 4097, float32, forward | 41 ms | failed | 4.1 ms (1.50x) |")


def test_page_is_well_formed_and_says_what_lost_and_what_is_missing(synthetic_record):
    loaded = record.load(synthetic_record)
    loaded["rows"][2] |= {"times_eager": 0.5, "times_compiled": 0.25, "called_seconds": 2e-3}
    loaded["rows"][2] |= {"called_times_eager": 0.75, "called_times_compiled": None}
    loaded["steps"] = {
        "parity": {"status": "failed", "summary": "1 of 2 <tests>", "seconds": 3.2, "log": "the log"},
        "memcheck": {"status": "skipped", "summary": "compute-sanitizer not found", "seconds": 0.0, "log": ""},
    }
    loaded["cases"] = {"some/test[case]": {"state": "timed out", "reason": "stopped after 9 s", "seconds": 9.0}}
    made = html.page(loaded, {})
    ElementTree.fromstring(made.removeprefix("<!doctype html>"))
    assert "1 of 3</span>" in made and "0.50x (slower)" in made and "0.25x (slower)" in made
    assert "1 of 2 &lt;tests&gt;" in made and "the log" in made and "compute-sanitizer not found" in made
    assert "stopped after 9 s" in made and "from Python" in made and "0.75x (slower)" in made
    assert "torch.compile was not measured" in made


def test_times_with_freed_memory_kept_stand_beside_the_others(synthetic_record):
    loaded = record.load(synthetic_record)
    for row in (loaded["rows"][0], loaded["rows"][2]):
        row |= {"kept_seconds": row["seconds"] / 2, "kept_times_eager": 1.25, "kept_times_compiled": None}
    assert "| 650 us (memory kept 325 us) | failed | 65 us (1.50x, memory kept 1.25x) |" in markdown.tables(loaded)
    made = html.page(loaded, {})
    assert '<th scope="col">memory kept</th>' in made and "325 us" in made and "1.25x" in made
    assert '<th scope="col">from Python</th>' not in made


def test_report_without_matplotlib_has_no_plots(synthetic_record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.write(record.load(synthetic_record), tmp_path / "report")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_record_of_one_length_has_no_plot_against_length(synthetic_record, tmp_path):
    loaded = record.load(synthetic_record)
    loaded["rows"] = loaded["rows"][:3]
    report.write(loaded, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"some-layer-speed-ups.png", "report.html"}


def test_marked_tables_of_a_text_are_made_from_their_records(synthetic_record, tmp_path):
    text = tmp_path / "text.md"
    begin = f"<!-- table {synthetic_record} | some layer -->"
    text.write_text(f"before\n{begin}\nold\n<!-- end -->\nafter\n")
    loaded = record.load(synthetic_record)
    last = loaded["rows"][-1]
    record.save(synthetic_record, loaded | {"rows": [*loaded["rows"], last | {"variant": "another"}]})
    for _ in range(2):  # the second time changes nothing
        report.main(["--update", str(text)])
        lines = text.read_text().splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) == 2 + 3 and set(rows) <= set(markdown.tables(record.load(synthetic_record)).splitlines())
        assert lines[:2] == ["before", begin] and lines[-2:] == ["<!-- end -->", "after"] and "old" not in lines
    text.write_text(f"<!-- table {synthetic_record} | another layer -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="no group 'another layer'"):
        report.main(["--update", str(text)])


def test_chosen_rows_of_a_text_are_made_from_their_record(synthetic_record, tmp_path):
    text = tmp_path / "text.md"
    begin = f"<!-- rows {synthetic_record}\nA module | some layer | B 8, N 4097, float32, forward\n-->\n"
    text.write_text(f"before\n{begin}<!-- end -->\nafter\n")
    for _ in range(2):
        report.main(["--update", str(text)])
        made = text.read_text()
        assert made.startswith(f"before\n{begin}") and made.endswith("<!-- end -->\nafter\n")
        rows = [line for line in made.splitlines() if line.startswith("|")]
        assert rows[2:] == ["| A module | 41 ms | 4.1 ms (1.50x) | 4.1 | 4.1 |"]
    text.write_text(made.replace("N 4097", "N 5"))
    with pytest.raises(SystemExit, match="no case 'B 8, N 5, float32, forward'"):
        report.main(["--update", str(text)])


def test_a_record_gives_the_block_of_a_table_with_the_faster_of_its_gpu_kernels(synthetic_record, tmp_path, capsys):
    loaded = record.load(synthetic_record)
    triton = [_row("tokenfusion (triton)", "triton", length, 5e-7 * length) for length in (65, 401)]
    wrong = _failed(_row("tokenfusion (triton)", "triton", 4097, 1e-9))
    record.save(synthetic_record, loaded | {"rows": [*loaded["rows"], *triton, wrong]})
    report.main([str(synthetic_record), "--rows", "--page", str(tmp_path / "page.html")])
    text = tmp_path / "README.md"
    text.write_text(capsys.readouterr().out.partition("<!--")[2].join(("<!--", "")))
    report.main(["--update", str(text)])
    rows = [line for line in text.read_text().splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[3].strip() for row in rows] == ["32.5 us (1.50x)", "200 us (1.50x)", "4.1 ms (1.50x)"]
    assert (tmp_path / "page.html").stat().st_size > 1000 and not list(tmp_path.glob("*.png"))


def test_rows_of_gpu_kernels_are_easy_to_match():
    of_op = {"group": "some_op, the op", "share_of_copy": 0.4}
    rows = [_row("eager", None, 65, 1.0), _row("tokenfusion (cuda)", "cuda", 65, 2e-6), _row("x", "cpu", 9, 1.0)]
    rows += [row | of_op for row in rows] + [_failed(rows[1]) | of_op]
    assert record.of_kernels(rows) == [
        {
            "kernel": "some_op",
            "backend": "cuda",
            "variant": "tokenfusion (cuda)",
            "sizes": {"B": 8, "N": 65},
            "dtype": "float32",
            "direction": "forward",
            "microseconds": 2.0,
            "share_of_copy": 0.4,
        }
    ]


def test_rows_of_two_runs_become_one_record(tmp_path):
    rows = [_row("eager", None, 65, 1.0), _row("eager", None, 65, 1.0, group="another"), _row("eager", None, 65, 2.0)]
    rows.append(_row("tokenfusion (cuda)", "cuda", 65, 1.0))
    ordered = record.load(record.save(tmp_path / "record.json", {"rows": rows}))["rows"]
    assert [(row["group"], row["variant"], row["seconds"]) for row in ordered] == [
        ("some layer", "eager", 2.0),
        ("some layer", "tokenfusion (cuda)", 1.0),
        ("another", "eager", 1.0),
    ]


@pytest.mark.parametrize("path", sorted(record.RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_records_that_are_kept_can_be_read(path):
    loaded = record.load(path)
    made = html.page(loaded, {})
    ElementTree.fromstring(made.removeprefix("<!doctype html>"))
    text, whole = summary.text(loaded["rows"]), markdown.tables(loaded)
    for group, cases in table.groups(loaded["rows"]):
        of_package = any(row["backend"] for _, members in cases for row in members)
        assert f"| {group} |" in whole and (group in text.replace("\n", " ")) == of_package
        assert all(f"| {table.case_name(case)} |" in whole for case, _ in cases)
    assert max(map(len, text.splitlines())) <= table.COLUMNS
