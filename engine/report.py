"""Rebuild a run's report, or compare several runs: python engine/report.py RUN [RUN ...]
[--out comparison.html]"""

from tempflow import cli
from tempflow.commands.report import main

if __name__ == "__main__":
    cli.run(main)
