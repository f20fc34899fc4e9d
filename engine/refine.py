"""Search for images of high reward: python engine/refine.py --run runs/tiny_ocr --out refined
[--rounds 8 --step 3..1]"""

from tempflow import cli
from tempflow.commands.refine import main

if __name__ == "__main__":
    cli.run(main)
