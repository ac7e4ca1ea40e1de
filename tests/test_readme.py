"""The measured tables of the README are those of the records that it names."""

import re

from benchmarks.report import markdown, record
from tests.conftest import ROOT


def test_every_figure_is_in_a_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"benchmarks/records/[\w.-]+\.json", readme))
    made = [line for path in paths for line in markdown.tables(record.load(ROOT / path)).splitlines()]
    measured = [line for line in readme.splitlines() if line.startswith("|") and re.search(r"\d (ms|us)", line)]
    assert len(measured) >= 8
    assert [line for line in measured if line not in made] == []
