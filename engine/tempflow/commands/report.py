"""Draw a run's report anew, or compare several runs on one page; the path goes to stdout."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Sequence

from tempflow import cli
from tempflow.errors import UserError
from tempflow.run.streams import check_result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from tempflow.arguments import path

    parser = argparse.ArgumentParser(
        description="Rebuild RUN/report.html, or compare several runs in one HTML file."
    )
    parser.add_argument("runs", metavar="RUN", type=path, nargs="+", help="run directory")
    parser.add_argument(
        "--out",
        type=path,
        help=(
            "file of a comparison (default: comparison.html); an older comparison there is replaced"
        ),
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    from tempflow.run.report import write_comparison
    from tempflow.run.report.comparable import load_recorded
    from tempflow.run.report.page import write_report

    args = parse_args(argv)
    if len(args.runs) > 1:
        print(write_comparison(args.runs, args.out or Path("comparison.html")))
    elif args.out:
        raise UserError("--out: the report of one run is always RUN/report.html; name two runs")
    else:
        print(write_report(load_recorded(args.runs[0]).folder))
    check_result()
    return 0


command = partial(cli.run, main)
