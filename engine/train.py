"""Train: deepspeed engine/train.py --config configs/tiny_ocr.json [--set section.key=value ...]
[--resume | --dry-run]"""

from tempflow import cli
from tempflow.commands.train import main

if __name__ == "__main__":
    cli.run(main)
