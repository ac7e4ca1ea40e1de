"""python -m benchmarks.report RECORD.json --out DIR: one HTML page and the plots of a record.

--page FILE: the page alone, which has the plots in it. With --markdown the tables of the record go to the standard
output. `python -m benchmarks.report --update FILE` makes the tables in a Markdown file anew. Each stands between
<!-- table RECORD.json | GROUP --> and <!-- end -->; or between <!-- rows RECORD.json, then a line
"LABEL | GROUP | CASE" for each row (and "| RECORD.json" where it comes from another one), and -->, and <!-- end -->.
"""

import argparse
import importlib.util
from pathlib import Path

from benchmarks.report import html, markdown, record, table

Plots = dict[str, tuple[str, bytes]]  # name -> caption, PNG


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?", help="JSON file that the benchmarks wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page and the plots go")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where the page goes, without the plots beside it")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the record")
    parser.add_argument(
        "--rows", action="store_true", help="print the block of which --update makes a table of its cases"
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="make the marked tables of this file anew")
    args = parser.parse_args(arguments)
    if args.update:
        args.update.write_text(markdown.updated(args.update.read_text(encoding="utf-8")), encoding="utf-8")
    elif args.record is None:
        parser.error("which record? or --update FILE")
    else:
        loaded = record.load(args.record)
        if args.out:
            write(loaded, args.out)
        if args.page:
            write_page(loaded, _plots(loaded), args.page)
        if args.rows:
            print(markdown.chosen_rows(args.record))
        if args.markdown:
            print(markdown.tables(loaded))


def write(loaded: dict, out: Path) -> None:
    """The page, and its plots where matplotlib is there."""
    out.mkdir(parents=True, exist_ok=True)
    plots = _plots(loaded)
    for group, found in plots.items():
        for name, (_, png) in found.items():
            (out / f"{record.file_name(f'{group} {name}')}.png").write_bytes(png)
    write_page(loaded, plots, out / "report.html")


def write_page(loaded: dict, plots: dict[str, Plots], path: Path) -> None:
    pictures = {group: dict(found.values()) for group, found in plots.items()}
    path.write_text(html.page(loaded, pictures), encoding="utf-8")


def _plots(loaded: dict) -> dict[str, Plots]:
    """Those of each group."""
    if not importlib.util.find_spec("matplotlib"):
        print("matplotlib is not installed: the page has no plots")
        return {}
    return {group: _plots_of(cases) for group, cases in table.groups(loaded["rows"])}


def _plots_of(cases: list[tuple[dict, list[dict]]]) -> Plots:
    from benchmarks.report import plots

    rows = [row for _, members in cases for row in members]
    found = {"speed-ups": ("How many times as fast as eager each variant is, case by case.", plots.speedups(rows))}
    for size, png in plots.time_against_sizes(rows).items():
        found[f"time against {size}"] = (f"Time of one call against {size}, logarithmic scales.", png)
    for size, png in plots.memory_against_sizes(rows).items():
        words = "The most memory held during a call beyond what was held before it, results included"
        found[f"memory against {size}"] = (f"{words}, against {size}.", png)
    return found


if __name__ == "__main__":
    main()
