"""Sample prompts with base and tuned model: python engine/sample.py --run runs/tiny_ocr --out
images"""

from tempflow import cli
from tempflow.commands.sample import main

if __name__ == "__main__":
    cli.run(main)
