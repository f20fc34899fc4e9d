"""Checkpoints: DeepSpeed's own state for resuming, consolidated safetensors for everything else.

    checkpoints/000040/deepspeed/   optimizer and weights, DeepSpeed's format, read back by this run alone
                       weights.safetensors, ema.safetensors   trained weights, whole, fp32
                       state.json   iteration, totals, config, versions
                       manifest.json   size and SHA-256 of every other file, written last
    checkpoints/latest

A checkpoint is written into a temporary folder that is renamed when complete. One without a manifest that matches its files
is never taken for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tempflow.errors import UserError
from tempflow.logs import write_atomic
from tempflow.trainer import comm
from tempflow.trainer.ema import Average
from tempflow.trainer.runtime import Runtime

MANIFEST = "manifest.json"


def folder(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"{iteration:06d}"


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save(runtime: Runtime, ema: Average | None, run_dir: Path, state: dict, keep: int) -> Path:
    """Write a checkpoint of all ranks and drop the oldest beyond `keep`. state: JSON values, with "iteration"."""
    final = folder(run_dir, state["iteration"])
    draft = final.with_name(f".saving-{final.name}")
    if comm.rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    comm.barrier()
    runtime.engine.save_checkpoint(str(draft / "deepspeed"), tag="state", save_latest=False)
    weights = {}
    for name, parameter in runtime.trainable.items():
        value = runtime.full_fp32(parameter)
        if comm.rank() == 0:
            weights[name] = value.cpu().contiguous()
    averages = ema.whole() if ema else None
    comm.barrier()
    if comm.rank() == 0:
        save_file(weights, draft / "weights.safetensors")
        if averages is not None:
            save_file({k: v.contiguous() for k, v in averages.items()}, draft / "ema.safetensors")
        (draft / "state.json").write_text(json.dumps(state, indent=1))
        _seal(draft)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(draft, final)
        write_atomic(run_dir / "checkpoints/latest", final.name + "\n")
        for old in sorted(complete_or_not(run_dir))[:-keep]:
            shutil.rmtree(old)
    comm.barrier()
    return final


def _seal(draft: Path) -> None:
    """Flush every file and list it in the manifest."""
    files = {}
    for file in sorted(p for p in draft.rglob("*") if p.is_file()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        files[str(file.relative_to(draft))] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    write_atomic(draft / MANIFEST, json.dumps(files, indent=1))


def complete_or_not(run_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, checked or not."""
    parent = run_dir / "checkpoints"
    return sorted(p for p in parent.iterdir() if p.is_dir() and p.name.isdigit()) if parent.is_dir() else []


def fault(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None."""
    manifest = checkpoint / MANIFEST
    try:
        files = json.loads(manifest.read_text())
    except (OSError, json.JSONDecodeError):
        return f"{manifest} is missing or damaged"
    for name, seen in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != seen["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, not {seen['bytes']}"
        if _digest(file) != seen["sha256"]:
            return f"{file} does not match its checksum"
    return None


def newest(run_dir: Path, note=lambda text: None) -> Path | None:
    """The newest whole checkpoint; broken ones are named through `note` and passed over."""
    for checkpoint in reversed(complete_or_not(run_dir)):
        trouble = fault(checkpoint)
        if trouble is None:
            return checkpoint
        note(f"checkpoint {checkpoint.name} is passed over: {trouble}")
    return None


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def load_weights(checkpoint: Path, which: str = "ema") -> tuple[dict, str]:
    """Trained weights of a checkpoint, "ema" where there is an average, else "raw"; and which it was.

    Raises UserError for a folder that is no whole checkpoint.
    """
    trouble = fault(checkpoint)
    if trouble:
        raise UserError(f"checkpoint {checkpoint} is not whole: {trouble}")
    averaged = checkpoint / "ema.safetensors"
    if which == "ema" and averaged.exists():
        return load_file(averaged), "ema"
    return load_file(checkpoint / "weights.safetensors"), "raw"


def restore(runtime: Runtime, ema: Average | None, checkpoint: Path) -> dict:
    """Put a run back to a checkpoint; returns its state. UserError where it was written by another number of ranks."""
    state = read_state(checkpoint)
    if state["world_size"] != comm.world_size() and runtime.stage > 0:
        raise UserError(
            f"checkpoint {checkpoint} was written by {state['world_size']} ranks under ZeRO, this run has "
            f"{comm.world_size()}; resume with {state['world_size']}"
        )
    path, _ = runtime.engine.load_checkpoint(str(checkpoint / "deepspeed"), tag="state")
    if path is None:
        raise UserError(f"checkpoint {checkpoint}: DeepSpeed could not read it")
    if ema:
        averages = checkpoint / "ema.safetensors"
        if not averages.exists():
            raise UserError(f"training.ema: checkpoint {checkpoint} holds no average; resume with ema null")
        ema.load(load_file(averages), state["ema_updates"])
    return state
