"""A small transformer's Runtime trained on made-up gradients, taken from one number of ranks to
another and back.

One rank makes 2 updates and saves; two ranks take that up, make 2 more and save; one rank takes
that up and makes the last 2. The middle part is this file as a script of two ranks, with the
folder as its argument.
"""

import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch
from engine_cases import MODEL, examples, small_config
from safetensors.torch import save_file

from tempflow import cli
from tempflow.types import Size

# name: (ZeRO stage, LoRA, bf16). Stage 1 in bf16 has an optimizer of its own in DeepSpeed.
CASES = {
    "full-zero0": (0, False, False),
    "full-zero2": (2, False, False),
    "full-zero3": (3, False, False),
    "lora-zero0": (0, True, False),
    "lora-zero2": (2, True, False),
    "lora-zero3": (3, True, False),
    "bf16-zero1": (1, True, True),
    "bf16-zero3": (3, True, True),
}
# What goes from one rank to two and back. The other two make only the last of these ways, in 4 and
# 8 bits (quantized_cases.py).
MOVED = [case for case in CASES if case not in ("lora-zero0", "lora-zero2")]
# With a large eps an update is nearly linear in the gradient: rounding stays rounding, and the
# moments still count.
ADAMW = {
    "type": "AdamW",
    "params": {"lr": 1e-3, "eps": 1e-3, "betas": [0.9, 0.99], "torch_adam": True},
}
# ZeRO-3 keeps small weights whole, and all in one group, unless told otherwise.
SPREAD = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20_000}
BEGINNING, MIDDLE, END = range(2), range(2, 4), range(4, 6)
ROWS = 4


@lru_cache
def policy():
    from tempflow.models import load_policy

    return load_policy(MODEL, max_sequence_length=20)


class Toy:
    """Its loss is the squared distance of velocities from a target; every rank takes its share of
    the rows."""

    def __init__(
        self,
        case: str,
        seed: int = 0,
        optimizer: dict = ADAMW,
        quantize: str | None = None,
        **section,
    ):
        from tempflow.training.ema import Average
        from tempflow.training.engine import Runtime
        from tempflow.training.merge import Merge

        self.optimizer = optimizer
        stage, lora, bf16 = CASES[case]
        zero = {"stage": stage, **(SPREAD if stage == 3 else {})}
        deepspeed = {
            "optimizer": optimizer,
            "zero_optimization": zero,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": bf16},
            **section,
        }
        config = small_config(
            model={
                "lora": {"rank": 4, "alpha": 8.0} if lora else None,
                "quantize": quantize,
                "dtype": "bfloat16" if quantize and bf16 else "float32",
            },
            deepspeed=deepspeed,
            training={"seed": seed},
        )
        self.runtime = Runtime(config, policy())
        self.average = Merge(self.runtime, 3, 1, "sqrt") if lora else Average(self.runtime, 0.5, 1)

    def train(self, updates: range) -> torch.Tensor:
        """Returns the gradients' norms."""
        from tempflow.training import distributed

        shape, norms = policy().latent_shape(Size(32, 96)), []
        with torch.no_grad():
            text = policy().embed(examples(['the word "FLOW"'] * ROWS))
        mine = slice(distributed.rank(), None, distributed.world_size())
        for number in updates:
            generator = torch.Generator().manual_seed(number)
            x, target = torch.randn(2, ROWS, *shape, generator=generator)
            sigma = torch.rand(ROWS, generator=generator)
            own = {name: tensor[mine] for name, tensor in text.items()}
            v = policy().velocity(
                self.runtime.engine,
                x[mine],
                sigma[mine],
                own,
                Size(32, 96),
                0.0,
                self.runtime.dtype,
            )
            self.runtime.accumulate(
                (v.float() - target[mine]).square().sum() / target.numel(), last=True
            )
            norms.append(self.runtime.step(1.0))
            self.average.update()
        return torch.tensor(norms, dtype=torch.float64)

    def held(self) -> dict[str, torch.Tensor]:
        """Weights, moments and average of every trained parameter, whole, fp32 (a collective)."""
        from deepspeed.utils import safe_get_full_optimizer_state

        held = {
            f"{name}:average": value
            for name, value in self.average.gather(self.runtime.trainable).items()
        }
        moments = ("exp_avg", "exp_avg_sq") if self.optimizer is ADAMW else ()
        plain = self.runtime.engine.optimizer.state if self.runtime.stage == 0 else None
        for name, parameter in self.runtime.trainable.items():
            held[name] = self.runtime.full_fp32(parameter)
            for key in moments:
                held[f"{name}:{key}"] = (
                    plain[parameter][key]
                    if plain
                    else safe_get_full_optimizer_state(parameter, key)
                )
        return {name: value.detach().float().clone().contiguous() for name, value in held.items()}

    def save(self, folder: Path, updates: int) -> dict[str, torch.Tensor]:
        """Write a checkpoint; returns what it holds."""
        from tempflow.checkpoints import save
        from tempflow.training import distributed

        state = {
            "iteration": updates,
            "world_size": distributed.world_size(),
            f"{self.average.key}_updates": self.average.updates,
        }
        save.save_checkpoint(self.runtime, self.average, folder, state, keep=9)
        return self.held()

    def restore(self, folder: Path) -> list[str]:
        """Take up the newest checkpoint; returns what was said."""
        from tempflow.checkpoints import find, load

        notes = []
        load.restore(self.runtime, self.average, find.newest(folder), notes.append)
        return notes

    def close(self) -> None:
        self.runtime.engine.destroy()


def main(folder: Path) -> None:
    from tempflow.training import distributed

    distributed.init_distributed()
    for case in MOVED:
        toy = Toy(case, seed=1)  # other adapters than those that are restored
        notes = toy.restore(folder / case)
        restored, norms = toy.held(), toy.train(MIDDLE)
        saved = toy.save(folder / case, MIDDLE.stop)
        if distributed.rank() == 0:
            for name, tensors in {
                "restored": restored,
                "saved": saved,
                "norms": {"norms": norms},
            }.items():
                save_file(
                    tensors, folder / case / f"{name}.safetensors", {"notes": "\n".join(notes)}
                )
        toy.close()
    seal_together(folder / "sealed")
    claim_apart(folder / "apart")


def seal_together(draft: Path) -> None:
    """Seal a folder; leaves beside it what each rank read."""
    from tempflow.checkpoints import manifest
    from tempflow.training import distributed

    read, flushed = [], manifest._flushed
    manifest._flushed = lambda file: read.append(str(file.relative_to(draft))) or flushed(file)
    manifest.seal(draft)
    (draft.parent / f"read-{distributed.rank()}.json").write_text(json.dumps(read))


def claim_apart(folder: Path) -> None:
    """Claim a run directory from a working directory of each rank's own; leaves what that
    brings."""
    from tempflow.errors import UserError
    from tempflow.run.directory import claim_run
    from tempflow.training import distributed

    here = folder / str(distributed.rank())
    here.mkdir(parents=True)
    os.chdir(here)
    try:
        with claim_run(small_config(logging={"dir": "runs", "name": "run"}), resume=False):
            pass
    except UserError as error:
        Path("error.txt").write_text(str(error))


if __name__ == "__main__":
    cli.run(lambda: main(Path(sys.argv[-1])))
