"""Starting runs of the engine as a user does, and reading what they leave behind."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import preloaded
import torch
from cpu_cases import VARIABLE, on_cpu
from engine_cases import HERE, ROOT, write_config
from safetensors.torch import load_file

from tempflow import cli

TIMEOUT_S = 900  # of a busy machine; a run takes some ten seconds on an idle one
LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# Plain gradient descent: an update is linear in the gradient, so that rounding stays rounding.
# Adam's first steps have the gradient's sign alone, and turn the rounding of a small gradient into
# a whole step.
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_optimization": {"stage": 0}}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "torch_adam": True}}
FEW_STEPS = {"num_steps": 5, "plan": {"branch_steps": [0, 1, 3]}}


def environment() -> dict:
    """The caller's, without what an earlier run in this process may have left, and with this
    project's commands and rewards.

    A run with it takes the machine's GPU where there is one, unless its test is marked `cpu`.
    """
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), env.get("PYTHONPATH", "")])
    if not torch.cuda.is_available():
        env[VARIABLE] = "cpu"
    return env


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_command(command) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    return subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def script(name: str, *arguments, server: int = 0) -> subprocess.CompletedProcess:
    """engine/NAME.py as a process of its own with the libraries loaded."""
    return file_apart(ROOT / f"engine/{name}.py", *arguments, server=server)


def file_apart(
    file: Path, *arguments, cwd: Path = ROOT, server: int = 0
) -> subprocess.CompletedProcess:
    """A Python file as a process of its own with the libraries loaded. Those of two servers differ
    in the hash seed."""
    return run_preloaded([environment()], file, *arguments, cwd=cwd, server=server)


def ranks(count: int, file: Path, *arguments) -> subprocess.CompletedProcess:
    """A Python file as `count` ranks with the libraries loaded, in the environment that a launcher
    makes for each."""
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_preloaded([shared | sizes | one for one in own], file, *arguments)


def run_preloaded(
    environments: list[dict], file: Path, *arguments, cwd: Path = ROOT, server: int = 0
) -> subprocess.CompletedProcess:
    """A process for each environment, all writing to one output; the first by this server."""
    command = [str(part) for part in (file, *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        started = [
            preloaded.start(number, command, env, str(cwd), out, err)
            for number, env in enumerate(environments, server)
        ]
        status = preloaded.supervise(started, TIMEOUT_S)
        texts = [file.read_text(errors="replace") for file in (out, err)]
    return subprocess.CompletedProcess(command, status, *texts)


def load_script(name: str):
    """engine/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"engine_{name}", ROOT / f"engine/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_here(name: str, *arguments) -> subprocess.CompletedProcess:
    """engine/NAME.py in this process, on the CPU, with the libraries loaded already; what it sets
    globally is put back.

    Its end is an ordinary one, whatever process group it joined.
    """
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    handlers = {
        kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        with (
            mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
            mock.patch.dict(os.environ),
            on_cpu(),
            mock.patch.object(cli, "in_process_group", lambda: False),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            for variable in LAUNCHED:
                os.environ.pop(variable, None)
            cli.run(load_script(name).main)
    except SystemExit as stop:
        return subprocess.CompletedProcess(
            [name, *arguments], stop.code, out.getvalue(), err.getvalue()
        )
    finally:
        torch.set_num_threads(threads)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    """engine/train.py under the deepspeed launcher."""
    command = [
        "deepspeed",
        "--num_accelerators",
        processes,
        "--master_port",
        free_port(),
        ROOT / "engine/train.py",
        *arguments,
    ]
    return run_command(command)


class Run:
    """A finished run's directory."""

    def __init__(
        self, folder: Path, done: subprocess.CompletedProcess | None = None, status: int = 0
    ):
        self.folder, self.done = folder, done
        if done is not None:
            assert done.returncode == status, (
                f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )

    @property
    def rows(self) -> list[dict]:
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.is_dir())

    def weights(
        self, iteration: int | None = None, name: str = "weights"
    ) -> dict[str, torch.Tensor]:
        iteration = self.checkpoints[-1] if iteration is None else iteration
        return load_file(self.folder / f"checkpoints/{iteration:06d}/{name}.safetensors")

    def pictures(self, iteration: int) -> list[bytes]:
        return [
            file.read_bytes()
            for file in sorted((self.folder / f"samples/{iteration:06d}").glob("*.png"))
        ]


def train(
    folder: Path,
    name: str,
    *more,
    processes: int | None = 0,
    launcher: bool = False,
    server: int = 0,
    status: int = 0,
    **changes,
) -> Run:
    """A run to its end: as `processes` ranks, as a process of its own (0), which `server` starts,
    or in this process (None). With `launcher` ranks are started as by a user: by the deepspeed
    launcher."""
    changes["logging"] = {"dir": str(folder), "name": name, **changes.get("logging", {})}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, f"{name}.json", **changes)
    arguments = ["--config", config, *more]
    if processes is None:
        done = script_here("train", *arguments)
    elif not processes:
        done = script("train", *arguments, server=server)
    elif launcher:
        done = launch(processes, *arguments)
    else:
        done = ranks(processes, ROOT / "engine/train.py", *arguments)
    return Run(folder / name, done, status)


def timeless(row: dict) -> dict:
    """A row of metrics.jsonl without what depends on the clock."""
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def train_checked(folder, name, more, reward, every, processes=0, rank=0, server=0, **deepspeed):
    return train(
        folder,
        name,
        *more,
        processes=processes,
        server=server,
        rollout=FEW_STEPS,
        rewards={"engine_rewards:Signalling": {**reward, "rank": rank}},
        training={
            "iterations": 4,
            "updates": {"passes": 2},
            "ema": {"decay": 0.5, "every": 3},
            "lr_decay": 0.1,
            "penalty": {"coef": 0.01},
        },
        eval={"precision_recall": 3},
        checkpoint={"every": every, "keep": 9},
        deepspeed={"optimizer": ADAMW, **deepspeed},
    )
