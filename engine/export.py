"""Write a run's model for diffusers: python engine/export.py --run runs/tiny_ocr --out FOLDER"""

from tempflow import cli
from tempflow.commands.export import main

if __name__ == "__main__":
    cli.run(main)
