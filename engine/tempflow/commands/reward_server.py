"""Serve rewards over HTTP to training runs, whose configs name them as the reward `http`.

The server needs fastapi, uvicorn, numpy and pillow, and whatever its rewards import, so it can run
in an environment of its own. docs/rewards.md shows both ends, tokens, and a detector served this
way. It has no TLS: across untrusted networks put a proxy in front of it.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import signal
import socket
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Sequence

from tempflow import cli
from tempflow.arguments import above_zero, bounded, filled, positive, whole
from tempflow.config import strict_json
from tempflow.errors import VALUE, UserError, counted, shortened
from tempflow.rewards import RewardSpec, parse_rewards
from tempflow.rewards.http.client import token_of

if TYPE_CHECKING:
    from tempflow.rewards.http.batching import Batcher


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve rewards over HTTP to training runs.")
    add = parser.add_argument
    add(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[=OPTIONS]",
        help=(
            "an id, module:Name, or any name with a JSON table of its type and options; may be"
            " repeated"
        ),
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; other than loopback needs --token-env (default: 127.0.0.1)",
    )
    add(
        "--port",
        type=whole(0, 65535),
        default=8600,
        metavar="N",
        help="port; 0 chooses a free one (default: 8600)",
    )
    add(
        "--token-env",
        type=filled,
        metavar="VARIABLE",
        help="environment variable with the token that clients must send",
    )
    add("--gpus", type=filled, metavar="I,J,...", help="GPUs, with one worker per reward on each")
    add(
        "--workers",
        type=whole(1, 1024),
        default=1,
        metavar="N",
        help="worker processes per reward, without --gpus (default: 1)",
    )
    add(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="CPU threads per worker (default: 1)",
    )
    add(
        "--batch",
        type=positive,
        default=16,
        metavar="N",
        help="most images scored at once, from one or several requests (default: 16)",
    )
    add(
        "--wait-ms",
        type=bounded("of at least 0", lambda value: value >= 0),
        default=5.0,
        metavar="MS",
        help="time that a partial batch waits for further requests (default: 5)",
    )
    add(
        "--timeout-s",
        type=above_zero,
        default=60.0,
        metavar="S",
        help="time limit from a request's arrival to its answer (default: 60)",
    )
    add(
        "--max-request-mb",
        type=positive,
        default=256,
        metavar="MB",
        help="largest body of one request (default: 256)",
    )
    add(
        "--max-megapixels",
        type=above_zero,
        default=128.0,
        metavar="MP",
        help="most pixels of one request's images together (default: 128)",
    )
    add(
        "--memory-mb",
        type=positive,
        default=4096,
        metavar="MB",
        help="most memory for all requests in progress (default: 4096)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    specs = checked_rewards(args)
    token = checked_token(args)
    try:
        import uvicorn

        from tempflow.rewards.http.server import Limits, create_app
    except ModuleNotFoundError as error:
        raise UserError(
            f"the reward server needs {error.name}: pip install fastapi uvicorn"
        ) from None

    limits = Limits(
        args.max_request_mb << 20,
        int(args.max_megapixels * 1e6),
        args.memory_mb << 20,
        args.timeout_s,
    )
    with ExitStack() as stack:
        # Bound before the models load: a port that is taken is reported at once.
        listener = stack.enter_context(bind(args.host, args.port))
        batchers = start_batchers(args, specs, stack)
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(batchers, limits, token),
                log_level="warning",
                access_log=False,
                server_header=False,
                # No request takes longer, so none is cut off by a shutdown.
                timeout_graceful_shutdown=math.ceil(args.timeout_s),
            )
        )
        # On a signal uvicorn finishes the requests in progress and then raises the signal again.
        # Ignore that one: it would end this process before the worker processes are closed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        # Only now: a client that can connect finds all rewards loaded.
        listener.listen()
        # An IPv6 address has brackets in a URL.
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(
            f"serving {', '.join(batchers)} at http://{host}:{listener.getsockname()[1]}",
            flush=True,
        )
        server.run(sockets=[listener])
        for name, batcher in batchers.items():
            counts = batcher.counts()
            print(
                f"{name}: {counted(counts['pictures'], 'image')} in"
                f" {counts['batches']} batch{'es' * (counts['batches'] != 1)},"
                f" {counts['failed_batches']} failed",
                flush=True,
            )
    return 0


def checked_rewards(args: argparse.Namespace) -> list[RewardSpec]:
    """The rewards to serve. Raises UserError for options that contradict each other."""
    if args.gpus and not all(part.strip() for part in args.gpus.split(",")):
        raise UserError(f"--gpus: expected numbers such as 0,1, got {args.gpus!r}")
    if args.memory_mb < args.max_request_mb:
        # Otherwise a request of an allowed size could never be served.
        raise UserError(
            f"--memory-mb: got {args.memory_mb}, expected at least the size of one request"
            f" (--max-request-mb {args.max_request_mb})"
        )
    specs = [read_reward(text) for text in args.reward]
    if len({spec.name for spec in specs}) < len(specs):
        raise UserError(
            '--reward: two rewards have the same name; write \'NAME={"type": "ocr"}\' to serve one'
            " under another name"
        )
    # Workers see no GPU without --gpus, so such a reward would fail after its model was loaded.
    if not args.gpus and (
        needy := [spec.name for spec in specs if spec.options.get("device") == "cuda"]
    ):
        raise UserError(
            f'--gpus: required, because reward {needy[0]} has "device": "cuda"; for example --gpus'
            " 0,1"
        )
    return specs


def checked_token(args: argparse.Namespace) -> str | None:
    """The token of --token-env. Raises UserError where other machines need one and it is
    missing."""
    token = token_of("--token-env", args.token_env or "")
    if token is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: anyone who reaches this address could use the server; put a token"
            " into an environment variable and name it with --token-env, or listen on 127.0.0.1"
        )
    return token


def start_batchers(
    args: argparse.Namespace, specs: list[RewardSpec], stack: ExitStack
) -> dict[str, Batcher]:
    """Start the worker processes of every reward, wait until all are ready, and close them with
    `stack`."""
    from tempflow.rewards.http.batching import Batcher

    gpus = args.gpus.split(",") if args.gpus else [""] * args.workers  # "": sees no GPU
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
    # A second loop, so that all rewards load at the same time.
    for batcher in batchers.values():
        batcher.wait_ready()
    return batchers


def read_reward(text: str) -> RewardSpec:
    """A value of --reward, such as 'ocr={"detect": false}', as a spec. Raises UserError."""
    name, given, options = text.partition("=")
    shown = shortened(text, VALUE)
    try:
        table = strict_json.loads(options) if given else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--reward {shown}: the options are not JSON: {error}") from None
    if not isinstance(table, dict) or {"weight", "frames"} & set(table):
        raise UserError(
            f"--reward {shown}: expected a table of the reward's options; weight and frames are set"
            " in the run's config"
        )
    return parse_rewards({name: table})[0]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name. Others may resolve to any address, so they count as reachable by others.
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen: while models load, clients are refused at once
    instead of waiting. Raises UserError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Lets a restarted server take its port back while old connections are still closing.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from None
    return listener


command = partial(cli.run, main)
