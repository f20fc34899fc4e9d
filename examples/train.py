"""Train from Python, with the other parts of this folder: `cd examples && python train.py`.

own_parts.json names plan.py, advantage.py, objective.py and reward.py. Arguments of the command
change the config, for example `python train.py training.iterations=2`. The run directory is
runs/own_parts.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import tempflow
from tempflow import cli

PROMPTS = ['the word "RED"', 'the word "WARM"']


def main() -> None:
    run = tempflow.train("own_parts.json", overrides=sys.argv[1:])["run_dir"]

    found = tempflow.evaluate(run, compare=True, count=16)
    print(f"held-out reward {found['base_reward']:.3f} before, {found['reward']:.3f} after")
    print(f"gain {found['gain']:+.3f} +- {found['gain_stderr']:.3f} (standard error)")

    # Both models start from the same noise. Images [n, height, width, 3], the base's on the left.
    both = [tempflow.sample(run, PROMPTS, base=base) for base in (True, False)]
    image = np.concatenate([np.concatenate(list(images)) for images in both], axis=1)
    Image.fromarray(image).save(Path(run, "before_after.png"))
    print(f"images: {run}/before_after.png; report: {run}/report.html")


if __name__ == "__main__":
    cli.run(main)
