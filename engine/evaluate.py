"""Score a run's model on held-out prompts: python engine/evaluate.py --run runs/tiny_ocr
[--base]"""

from tempflow import cli
from tempflow.commands.evaluate import main

if __name__ == "__main__":
    cli.run(main)
