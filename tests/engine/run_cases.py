"""Starting runs of the engine as a user does, and reading what they leave behind."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from engine_cases import HERE, ROOT, write_config
from safetensors.torch import load_file

TIMEOUT_S = 900  # of a busy machine; a run takes some ten seconds on an idle one
LAUNCHED = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Plain gradient descent: an update is linear in the gradient, so that rounding stays rounding. Adam's first steps have the
# gradient's sign alone, and turn the rounding of a small gradient into a whole step.
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_optimization": {"stage": 0}}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "torch_adam": True}}


def environment() -> dict:
    """The caller's, without what an earlier run in this process may have left, and with this project's commands and rewards."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), env.get("PYTHONPATH", "")])
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    return env


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_command(command, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], env=environment(), cwd=cwd, capture_output=True, text=True,
                          timeout=TIMEOUT_S)  # fmt: skip


def script(name: str, *arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """engine/NAME.py as a process of its own."""
    return run_command([sys.executable, ROOT / f"engine/{name}.py", *arguments], cwd)


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    """engine/train.py under the deepspeed launcher."""
    command = ["deepspeed", "--num_accelerators", processes, "--master_port", free_port(), ROOT / "engine/train.py", *arguments]
    return run_command(command)


class Run:
    """A finished run's directory."""

    def __init__(self, folder: Path, done: subprocess.CompletedProcess | None = None):
        self.folder, self.done = folder, done
        if done is not None:
            assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.is_dir())

    def weights(self, iteration: int | None = None, name: str = "weights") -> dict[str, torch.Tensor]:
        iteration = self.checkpoints[-1] if iteration is None else iteration
        return load_file(self.folder / f"checkpoints/{iteration:06d}/{name}.safetensors")

    def pictures(self, iteration: int) -> list[bytes]:
        return [file.read_bytes() for file in sorted((self.folder / f"samples/{iteration:06d}").glob("*.png"))]


def train(folder: Path, name: str, *more, processes: int = 0, **changes) -> Run:
    """A run to its end: under the launcher with `processes`, or without it where that is 0."""
    changes["logging"] = {"dir": str(folder), "name": name, **changes.get("logging", {})}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, f"{name}.json", **changes)
    done = launch(processes, "--config", config, *more) if processes else script("train", "--config", config, *more)
    return Run(folder / name, done)


def timeless(row: dict) -> dict:
    """A row of metrics.jsonl without what depends on the clock."""
    return {key: value for key, value in row.items() if not key.startswith("time/")}
