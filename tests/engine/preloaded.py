"""Python scripts in processes of their own that have the libraries loaded already.

To import torch, transformers, diffusers and DeepSpeed takes longer than most runs of these tests
do. A server imports them once and forks for every script that is asked for. The script's process
has its own arguments, environment, working directory, output and end, signals included, as a
fresh one has. Each rank has a server of its own, so that ranks differ in the hash seed, as
processes that a launcher starts do.

Not for a GPU: a fork inherits a used driver. Not for another environment than the server's, which
libraries read while they are imported. Both get fresh processes.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import subprocess
import sys
import time
from pathlib import Path

# What tells one process of the tests from another and no library reads when it is imported.
OWN = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OWN += ("MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST")
GRACE_S = 10  # between asking a rank to end because another failed, and killing it


class Server:
    """Runs one script after another, each in a fork. Has what `supervise` uses of a Popen."""

    def __init__(self, env: dict):
        self.env = _shared(env)
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self.returncode = None
        atexit.register(self.close)

    def close(self) -> None:
        with self._process as server:  # closes its pipes
            server.terminate()

    def start(self, command: list[str], env: dict, cwd: str, out: str, err: str) -> "Server":
        request = {"command": command, "env": env, "cwd": cwd, "out": out, "err": err}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid, self.returncode = self._read(), None
        return self

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._process.stdout], [], [], 0)[0]:
            self.returncode = self._read()
        return self.returncode

    def send_signal(self, number: int) -> None:
        # It may have ended, with its status still on the way here.
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)

    def _read(self) -> int:
        line = self._process.stdout.readline()
        assert line, "the server that preloads libraries has ended"
        return int(line)


_servers: list[Server] = []


def start(rank: int, command: list[str], env: dict, cwd: str, out: Path, err: Path):
    """A script and its arguments as a process with the libraries loaded, where that can be: a
    Server or a Popen. It appends to the files `out` and `err`."""
    import torch

    if not torch.cuda.is_available():
        while len(_servers) <= rank:
            _servers.append(Server(env))
        if _servers[rank].env == _shared(env):
            return _servers[rank].start(command, env, cwd, str(out), str(err))
    with open(out, "a") as stdout, open(err, "a") as stderr:
        return subprocess.Popen(
            [sys.executable, *command], env=env, cwd=cwd, stdout=stdout, stderr=stderr
        )


def _shared(env: dict) -> dict:
    return {name: value for name, value in env.items() if name not in OWN}


def supervise(ranks: list, timeout_s: float) -> int:
    """Wait for all; where one fails the others are ended, as launchers do. Returns the status of
    the first that failed, or 0. Raises TimeoutError."""
    until, failed = time.monotonic() + timeout_s, 0
    try:
        while running := [rank for rank in ranks if rank.poll() is None]:
            status = next((rank.returncode for rank in ranks if rank.returncode), 0)
            if status and not failed:
                failed, until = status, min(until, time.monotonic() + GRACE_S)
                for rank in running:
                    rank.terminate()
            if time.monotonic() > until:
                break
            time.sleep(0.01)
    finally:
        for rank in ranks:
            rank.kill()
    while any(rank.poll() is None for rank in ranks):  # what was killed
        time.sleep(0.01)
    if running and not failed:
        raise TimeoutError(f"still running after {timeout_s} s")
    return failed or next((rank.returncode for rank in ranks if rank.returncode), 0)


# -------------------------------------------------------------------------- in the server's process
def preload() -> None:
    """What training, evaluation and the other commands import."""
    from tempflow import cli

    cli.quiet_libraries()
    import diffusers
    import transformers

    for name in ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "T5EncoderModel", "CLIPTokenizer", "T5TokenizerFast"):
        getattr(transformers, name)
    import peft  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import tempflow.estimate  # noqa: F401
    import tempflow.models.opened  # noqa: F401
    import tempflow.run.evaluation  # noqa: F401
    import tempflow.training.loop  # noqa: F401

    # The first model that is loaded compiles a thousand patterns, of every architecture.
    get_checkpoint_conversion_mapping("t5")


def serve() -> list[str]:
    """Fork for every request; in the fork, return the script and its arguments."""
    replies = os.dup(1)
    os.dup2(2, 1)
    for line in iter(sys.stdin.buffer.raw.readline, b""):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(replies)
            atexit.register(gc.unfreeze)  # or nanobind reports what its modules hold as leaked
            become(request)
            return request["command"]
        os.write(replies, b"%d\n" % pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(replies, b"%d\n" % status)
    os._exit(0)


def become(request: dict) -> None:
    """Take a request's environment, working directory and output."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    gc.disable()
    preload()
    gc.enable()
    gc.freeze()  # what all forks share is not written to by the collector
    runpy.run_path(serve()[0], run_name="__main__")
