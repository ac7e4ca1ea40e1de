"""The measured tables of the README are those of the record that it names."""

import re

from benchmarks import record, report
from tests.conftest import ROOT


def test_every_figure_is_in_the_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (path,) = set(re.findall(r"benchmarks/records/[\w.-]+\.json", readme))
    made = report.markdown(record.load(ROOT / path)).splitlines()
    measured = [line for line in readme.splitlines() if line.startswith("|") and re.search(r"\d (ms|us)", line)]
    assert len(measured) >= 8
    assert [line for line in measured if line not in made] == []
