"""Runtimes on a base in 4 and 8 bits, and with AdamW8bit, that train on two ranks what one rank
trains: this file as a script of two ranks, with a folder as its argument.

Each is trained and saved; some are trained on, and again from what was saved.
"""

import sys
from pathlib import Path

import torch
from elastic_cases import ADAMW, BEGINNING, MIDDLE, Toy
from safetensors.torch import save_file

from tempflow import cli

EIGHT_BIT = {
    "type": "AdamW8bit",
    "params": {name: v for name, v in ADAMW["params"].items() if name != "torch_adam"},
}
# name: (case of elastic_cases, kind of base, optimizer)
RUNS = {
    "4bit-zero0": ("lora-zero0", "4bit", ADAMW),
    "4bit-bf16-zero1": ("bf16-zero1", "4bit", ADAMW),
    "8bit-zero2": ("lora-zero2", "8bit", ADAMW),
    "adam-zero0": ("full-zero0", None, EIGHT_BIT),
    "adam-zero3": ("full-zero3", None, EIGHT_BIT),
}
RESUMED = ("adam-zero0", "adam-zero3")  # of two ranks, on two ranks


def toy(name: str, seed: int = 0) -> Toy:
    case, quantize, optimizer = RUNS[name]
    return Toy(case, seed=seed, optimizer=optimizer, quantize=quantize)


def trained(name: str) -> tuple[Toy, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """After the first updates; the weights before them, and all that it holds after them."""
    one = toy(name)
    trainable = one.runtime.trainable.items()
    start = {name: one.runtime.full_fp32(p).clone() for name, p in trainable}
    return one, start, {"norms": one.train(BEGINNING), **one.held()}


def main(folder: Path) -> None:
    from tempflow.training import distributed

    distributed.init_distributed()
    for name in RUNS:
        first, _, held = trained(name)
        first.save(folder / name, BEGINNING.stop)
        found = {"held": held}
        if name in RESUMED:
            found["after"] = {"norms": first.train(MIDDLE), **first.held()}
        first.close()
        if name in RESUMED:
            second = toy(name, seed=1)
            assert second.restore(folder / name) == []
            found["again"] = {"norms": second.train(MIDDLE), **second.held()}
            second.close()
        if distributed.rank() == 0:
            for what, tensors in found.items():
                save_file(tensors, folder / name / f"{what}.safetensors")


if __name__ == "__main__":
    cli.run(lambda: main(Path(sys.argv[-1])))
