"""The figures of the README and of the documentation are those of records, and what they name is there."""

import re

import pytest

from benchmarks.convergence import show as trainings
from benchmarks.gpu_model import show as predictions
from benchmarks.report import markdown
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_tables_are_those_of_their_records(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    assert markdown.updated(text) == text, "run python -m benchmarks.report --update on it"
    marked = "".join(re.findall(r"<!-- (?:table|rows) .*?<!-- end -->", text, re.DOTALL))
    measured = [line for line in text.splitlines() if line.startswith("|") and re.search(r"\d (ms|us)", line)]
    assert [line for line in measured if line not in marked] == []


def test_something_is_measured():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(re.findall(r"^\|.*\d (?:ms|us)", text, re.MULTILINE)) >= 50


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_readme_can_be_read_in_a_minute():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_trainings_are_those_of_their_records(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    assert trainings.updated(text) == text, "run python -m benchmarks.convergence --update on it"


def test_some_page_shows_trainings():
    assert any("<!-- convergence " in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_predicted_tables_are_those_of_their_counts(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    assert predictions.updated(text) == text, "run python -m benchmarks.gpu_model --update on it"
