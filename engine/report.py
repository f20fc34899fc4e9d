"""The report of a run, or several runs on one page: python engine/report.py RUN [RUN ...]
[--out comparison.html]"""

from tempflow import cli
from tempflow.commands.report import main

if __name__ == "__main__":
    cli.run(main)
