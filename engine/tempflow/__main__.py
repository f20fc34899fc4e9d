"""Small commands: list what a config can name (`python -m tempflow components`), and measure how
far two folders of images are apart (`drift`)."""

from __future__ import annotations

import argparse
import inspect
import json

from tempflow import cli
from tempflow.arguments import path, positive
from tempflow.errors import UserError
from tempflow.registry import KINDS, Kind, find, options_of, summary_of

EPILOG = (
    "Training, evaluation, sampling and export: tempflow-train, tempflow-evaluate, tempflow-sample,"
    " tempflow-export."
)


def components() -> str:
    """All components by kind, one a line: id, options with defaults, and what it is.

    Loss weights of steps are listed too: they are chosen in the same way, but are not classes.
    """
    from tempflow.sampling.weights import PROFILES  # loads torch

    weights = [
        "weighting: training.weighting",
        *(f"  {value}: {what}" for value, what in PROFILES.items()),
    ]
    return "\n\n".join(
        [*(_of_kind(name, kind) for name, kind in KINDS.items()), "\n".join(weights)]
    )


def _of_kind(name: str, kind: Kind) -> str:
    return "\n".join([f"{name}: {kind.key}", *(f"  {_line(name, id)}" for id in kind.ids)])


def _line(name: str, id: str) -> str:
    try:
        target = find(name, id)
    except UserError as error:
        # Its package is not installed. The other components are listed all the same.
        return f"{id}: {error}"
    # The constructor's arguments of a policy are not options: it is made from a checkpoint.
    options = "" if name == "policy" else f"({', '.join(_option(o) for o in options_of(target))})"
    return f"{id}{options}: {summary_of(target)}"


def _option(option) -> str:
    return (
        option.name
        if option.default is inspect.Parameter.empty
        else f"{option.name}={json.dumps(option.default, default=repr)}"
    )


def main() -> int:
    cli.quiet_libraries()
    parser = argparse.ArgumentParser(prog="python -m tempflow", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("components", help="list what a config can name, with the options of each")
    drift = commands.add_parser(
        "drift",
        help=(
            "measure how far the PNG or WebP files of one folder are from the files with the same"
            " names in another; prints JSON"
        ),
    )
    drift.add_argument(
        "base", type=path, help="folder of the base's images, such as RUN/samples/000000"
    )
    drift.add_argument(
        "now", type=path, help="folder of the images now, such as RUN/samples/000150"
    )
    drift.add_argument(
        "--neighbors",
        type=positive,
        metavar="K",
        help="also measure precision and recall, with balls to the K-th nearest image",
    )
    args = parser.parse_args()
    if args.command == "components":
        print(components())
    elif args.command == "drift":
        from tempflow.run.drift import between_folders  # loads torch, which --help does without

        print(json.dumps(between_folders(args.base, args.now, args.neighbors)))
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    cli.run(main)
