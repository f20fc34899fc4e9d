"""Rebuild the report of a run, or compare several runs on one page; prints the path of the page."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Sequence

from tempflow import arguments, cli
from tempflow.errors import UserError
from tempflow.run.streams import check_result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Rebuild RUN/report.html of one run, or compare several runs in one HTML file."
    )
    parser.add_argument("runs", metavar="RUN", type=arguments.path, nargs="+", help="run directory")
    parser.add_argument(
        "--out",
        type=arguments.path,
        metavar="FILE",
        help="file of a comparison; replaces an older one (default: comparison.html)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    from tempflow.run.report import write_comparison
    from tempflow.run.report.comparable import load_recorded
    from tempflow.run.report.page import write_report

    args = parse_args(argv)
    # One run's report belongs to its directory, so it has no --out; a comparison belongs to none.
    if len(args.runs) > 1:
        print(write_comparison(args.runs, args.out or Path("comparison.html")))
    elif args.out:
        raise UserError(
            f"--out {args.out}: only for a comparison of several runs; the report of one run is"
            " always RUN/report.html"
        )
    else:
        print(write_report(load_recorded(args.runs[0]).folder))
    check_result()
    return 0


command = partial(cli.run, main)
