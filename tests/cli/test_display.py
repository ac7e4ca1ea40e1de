import sys

import pytest

from tokenfusion.cli.display import console, show, table


@pytest.mark.parametrize("width", [80, 30, 10])
def test_numbers_and_words_stay_whole(capsys, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    rows = [("tokenfusion", "1234.56", "replaced (single_query_attention)")]
    show(console(width), table("A title", ("", "time [ms]", "outcome"), rows, numbers=("time [ms]",)))
    shown = capsys.readouterr().out
    for whole in ("tokenfusion", "1234.56", "time [ms]", "(single_query_attention)"):
        assert whole in shown


def test_a_title_that_is_wider_than_its_rows_stays_on_a_line(capsys):
    show(console(), table("Backends of an operator (asked for: auto)", ("", ""), [("cpu", "runs")]))
    assert "Backends of an operator (asked for: auto)" in capsys.readouterr().out
