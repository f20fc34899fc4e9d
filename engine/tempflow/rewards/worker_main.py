"""The program of one reward worker: `python -m tempflow.rewards.worker_main PIPE PARENT`, started
by `workers.py`.

It is a program of its own and not a multiprocessing child, because those import the parent's main
script again, and with it torch and DeepSpeed. It answers one message at a time, and ends when its
parent ends.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from tempflow.errors import UserError
from tempflow.rewards.base import as_scores
from tempflow.rewards.registry import load_rewards


def main() -> None:
    """Load the rewards, report to the parent, then score until the pipe closes."""
    # On these signals the trainer finishes its step, for which it still needs scores. The workers
    # may get them as well, from a job scheduler that signals all processes of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    connection = Connection(fd)
    # Before the rewards are loaded, which can take minutes.
    threading.Thread(target=_exit_with_parent, args=(fd, parent), daemon=True).start()
    specs, threads = connection.recv()
    try:
        rewards = load_rewards(specs, threads)
    # Every failure to load is a UserError; anything else prints a traceback, which the parent shows
    # as the process's last output.
    except UserError as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", None))
    while True:
        name, images, prompts, metadata = connection.recv()
        connection.send(_answer(rewards[name], images, prompts, metadata))


def _answer(reward, images, prompts, metadata) -> tuple:
    """("scores", (values, details, maps, seconds)) or ("failed", traceback)."""
    start = time.perf_counter()
    try:
        scores = as_scores(reward.score(images, prompts, metadata), len(images))
    except Exception:
        return "failed", traceback.format_exc()
    return "scores", (scores.values, scores.details, scores.maps, time.perf_counter() - start)


def _exit_with_parent(fd: int, parent: int) -> None:
    """End the process, even while it scores, once the pipe is closed or the parent has ended.

    Both are watched, because after a fork of the parent a copy of the pipe can outlive it.
    """
    poll = select.poll()
    poll.register(fd, 0)  # no events asked for: only hang-up and error are reported
    while os.getppid() == parent and not poll.poll(1000):  # milliseconds
        pass
    os._exit(0)  # not sys.exit, which would end this thread only


if __name__ == "__main__":
    main()
