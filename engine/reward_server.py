"""Serve rewards over HTTP: python engine/reward_server.py --reward ocr [--reward 'NAME={"option":
value}' ...]"""

from tempflow import cli
from tempflow.commands.reward_server import main

if __name__ == "__main__":
    cli.run(main)
