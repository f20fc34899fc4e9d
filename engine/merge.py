"""Write the mean of several runs' weights for diffusers: python engine/merge.py runs/a runs/b --out
FOLDER [--weights 0.7 0.3]"""

from tempflow import cli
from tempflow.commands.merge import main

if __name__ == "__main__":
    cli.run(main)
