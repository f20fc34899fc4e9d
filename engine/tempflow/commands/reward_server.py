"""Serve rewards over HTTP.

The training side is the reward `http`; docs/rewards.md shows both ends, tokens, and how to serve a
detector such as GenEval's in an environment of its own: this needs fastapi, uvicorn, numpy and
pillow, and what the rewards import.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import signal
import socket
from contextlib import ExitStack, closing
from functools import partial
from typing import Sequence

from tempflow import cli
from tempflow.arguments import filled, positive, whole
from tempflow.config import strict_json
from tempflow.errors import VALUE, UserError, shortened
from tempflow.rewards import RewardSpec, parse_rewards
from tempflow.rewards.http.client import token_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve rewards over HTTP to training runs.")
    add = parser.add_argument
    add(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[=OPTIONS]",
        help="an id, module:Name, or any name with options as JSON",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but this machine's own needs --token-env",
    )
    add("--port", type=whole(0, 65535), default=8600, help="0 takes a free one (default: 8600)")
    add(
        "--token-env",
        type=filled,
        metavar="VARIABLE",
        help="environment variable that holds the token clients must send",
    )
    add("--gpus", type=filled, metavar="I,J,...", help="one worker process on each of these GPUs")
    add(
        "--workers",
        type=whole(1, 1024),
        default=1,
        help="without --gpus: worker processes per reward (default: 1)",
    )
    add("--threads", type=positive, default=1, help="CPU threads of each worker (default: 1)")
    add(
        "--batch",
        type=positive,
        default=16,
        help="most images scored at once, of one request or several (default: 16)",
    )
    add(
        "--wait-ms",
        type=float,
        default=5.0,
        help="how long a batch that is not full waits for other requests (default: 5)",
    )
    add(
        "--timeout-s",
        type=float,
        default=60.0,
        help="from a request's arrival to its answer (default: 60)",
    )
    add(
        "--max-request-mb",
        type=positive,
        default=256,
        help="most of one request's body (default: 256)",
    )
    add(
        "--max-megapixels",
        type=float,
        default=128.0,
        help="most of one request's images together (default: 128)",
    )
    add(
        "--memory-mb",
        type=positive,
        default=4096,
        help="most that all requests being served may hold (default: 4096)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    check_numbers(args)
    specs = [read_reward(text) for text in args.reward]
    if len({spec.name for spec in specs}) < len(specs):
        raise UserError(
            '--reward: two rewards of one name; write \'NAME={"type": "ocr"}\' to serve one under'
            " another name"
        )
    if not args.gpus and (
        needy := [spec.name for spec in specs if spec.options.get("device") == "cuda"]
    ):
        raise UserError(
            f'--gpus: {needy[0]} has "device": "cuda"; name the GPUs to use, as in --gpus 0,1'
        )
    token = token_of("--token-env", args.token_env or "")
    if token is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: whoever reaches this address could use the server; put a token"
            " into an environment variable and name it with --token-env, or listen on 127.0.0.1"
        )
    try:
        import uvicorn

        from tempflow.rewards.http.server import Limits, create_app
    except ModuleNotFoundError as error:
        raise UserError(
            f"the reward server needs {error.name}: pip install fastapi uvicorn"
        ) from None
    from tempflow.rewards.http.batching import Batcher

    limits = Limits(
        args.max_request_mb << 20,
        int(args.max_megapixels * 1e6),
        args.memory_mb << 20,
        args.timeout_s,
    )
    gpus = args.gpus.split(",") if args.gpus else [""] * args.workers
    with ExitStack() as stack:
        listener = stack.enter_context(bind(args.host, args.port))
        batchers = {
            spec.name: stack.enter_context(
                closing(
                    Batcher(
                        spec,
                        gpus=gpus,
                        threads=args.threads,
                        batch=args.batch,
                        wait_s=args.wait_ms / 1000,
                        timeout_s=args.timeout_s,
                    )
                )
            )
            for spec in specs
        }
        for batcher in batchers.values():
            batcher.wait_ready()
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(batchers, limits, token),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(args.timeout_s),
            )
        )
        # uvicorn answers a signal by finishing what it serves, then raises it again: the workers
        # are still to be closed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        listener.listen()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(
            f"serving {', '.join(batchers)} at http://{host}:{listener.getsockname()[1]}",
            flush=True,
        )
        server.run(sockets=[listener])
        for name, batcher in batchers.items():
            counts = batcher.counts()
            print(
                f"{name}: {counts['pictures']} images in {counts['batches']} batches,"
                f" {counts['failed_batches']} failed",
                flush=True,
            )
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("timeout_s", "max_megapixels"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')}: must be above 0, got {getattr(args, name)}"
            )
    if not 0 <= args.wait_ms < math.inf:
        raise UserError(f"--wait-ms: must be at least 0, got {args.wait_ms}")
    if args.gpus and not all(part.strip() for part in args.gpus.split(",")):
        raise UserError(f"--gpus: expected numbers such as 0,1, got {args.gpus!r}")
    if args.memory_mb < args.max_request_mb:
        raise UserError(
            f"--memory-mb: {args.memory_mb} is less than one request may hold (--max-request-mb"
            f" {args.max_request_mb})"
        )


def read_reward(text: str) -> RewardSpec:
    """--reward 'ocr={"detect": false}' as a spec."""
    name, given, options = text.partition("=")
    shown = shortened(text, VALUE)
    try:
        table = strict_json.loads(options) if given else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--reward {shown}: the options are not JSON: {error}") from None
    if not isinstance(table, dict) or {"weight", "frames"} & set(table):
        raise UserError(
            f"--reward {shown}: expected a table of the reward's options (weight and frames belong"
            " into the run's config)"
        )
    return parse_rewards({name: table})[0]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: clients are refused, not kept waiting, while models
    load."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from None
    return listener


command = partial(cli.run, main)
