"""Prompts to pictures, base and tuned side by side: python engine/sample.py --run runs/tiny_ocr
--out pictures"""

from tempflow import cli
from tempflow.commands.sample import main

if __name__ == "__main__":
    cli.run(main)
