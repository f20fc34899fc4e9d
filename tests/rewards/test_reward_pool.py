"""The pool: what goes wrong in a worker ends as NaN and a count, and never as a hang, a 0 or an
orphan."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tempflow.errors import UserError
from tempflow.rewards import RewardPool, RewardSpec


def batch(*pixels):
    images = np.zeros((len(pixels), 4, 6, 3), np.uint8)
    images[:, 0, 0, 0] = pixels
    return images, [f"prompt {p}" for p in pixels], [{} for _ in pixels]


def pool_of(*specs, workers=1, **options):
    options = {"backoff_s": 0.01, "start_timeout_s": 60.0, **options}
    specs = [RewardSpec(spec) if isinstance(spec, str) else spec for spec in specs]
    return RewardPool(specs, workers=workers, threads_per_worker=1, **options)


def faulty(tmp_path, fault, times):
    options = {"fault": fault, "counter": str(tmp_path / "calls"), "times": times}
    return RewardSpec("faulty_rewards:Faulty", 1.0, options)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_come_back_to_their_tickets(workers):
    pixel, double = (
        "faulty_rewards:first_pixel",
        RewardSpec("faulty_rewards:first_pixel", 1.0, {"scale": 2.0}),
    )
    with pool_of(pixel, workers=workers) as pool, pool_of(double, "jpeg", workers=0) as other:
        tickets = [pool.submit(*batch(i, i + 1, i + 2)) for i in range(8)]
        for i, scores in reversed(list(enumerate(pool.gather(tickets)))):
            assert scores[pixel].values.tolist() == [i, i + 1, i + 2]
            assert scores[pixel].values.dtype == np.float32
        (both,) = other.gather([other.submit(*batch(5))])
        assert both[pixel].values.tolist() == [10] and both["jpeg"].details
        assert pool.gather(tickets[:1])[0][pixel].values.tolist() == [
            0,
            1,
            2,
        ], "a ticket can be read again"
        assert pool.failures == 0 and pool.last_error is None


def test_submitted_images_may_be_overwritten():
    with pool_of("faulty_rewards:first_pixel") as pool:
        images, prompts, metadata = batch(7)
        ticket = pool.submit(images, prompts, metadata)
        images[:] = 0
        assert pool.gather([ticket])[0]["faulty_rewards:first_pixel"].values.tolist() == [7]


def test_submit_does_not_wait_and_the_busy_time_is_told():
    """Two batches of 1 s are hidden behind the caller's own work; their cost is still reported."""
    with pool_of(RewardSpec("faulty_rewards:Slow", 1.0, {"seconds": 1.0}), workers=2) as pool:
        pool.wait_ready()
        start = time.perf_counter()
        tickets = [pool.submit(*batch(1, 2)), pool.submit(*batch(3, 4))]
        assert time.perf_counter() - start < 0.5
        pool.gather(tickets)
        assert time.perf_counter() - start < 1.9, "two workers score side by side"
        assert all(1.0 <= ticket.seconds < 1.9 for ticket in tickets)


def test_worker_environment(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pool_of("faulty_rewards:Environment") as pool:
        (scores,) = pool.gather([pool.submit(*batch(1))])
    told = scores["faulty_rewards:Environment"].details[0]
    assert told == "torch=False threads=1 OMP=1 CUDA='' RANK=None"


ANSWERS = {
    "raising": "no idea",
    "nan": "NaN for every image",
    "infinite": "infinite value",
    "short": "shape [4] for 3 images",
    "text": "not 3 numbers",
}
BREAKDOWNS = {
    "killed": "died with exit status -9",
    "crashing": "about to crash",
    "garbling": "malformed message",
    "hanging": "did not answer within 2 s (timeout_s)",
}


@pytest.mark.parametrize(
    "fault, words", [*ANSWERS.items(), *BREAKDOWNS.items()], ids=[*ANSWERS, *BREAKDOWNS]
)
def test_fault_is_retried_and_a_worker_that_answers_is_kept(fault, words, tmp_path):
    spec = faulty(tmp_path, fault, times=1)
    with pool_of(spec, timeout_s=2.0 if fault == "hanging" else 30.0) as pool:
        pool.wait_ready()
        (before,) = pool.workers.pids
        (scores,) = pool.gather([pool.submit(*batch(1, 2, 3))])
        assert scores[spec.name].values.tolist() == [1, 1, 1]
        assert pool.failures == 0
        assert words in pool.last_error
        kept = fault in ANSWERS
        assert (pool.workers.pids == [before]) == kept and alive(before) == kept


@pytest.mark.parametrize("fault", ["raising", "nan", "killed"])
def test_fault_that_stays_is_a_mask(fault, tmp_path):
    """Three tries, then NaN and a count; the other reward and later batches are untouched. A worker
    that raised for three batches in a row is replaced, for it may be the process that is broken;
    one that cannot score them is not."""
    spec = faulty(tmp_path, fault, times=3)
    with pool_of(spec, "faulty_rewards:first_pixel", retries=2) as pool:
        pool.wait_ready()
        before = pool.workers.pids
        first, second = pool.gather([pool.submit(*batch(1, 2, 3)), pool.submit(*batch(4, 5))])
        assert np.isnan(first[spec.name].values).all() and len(first[spec.name].values) == 3
        assert first[spec.name].details[0].startswith("not scored: ")
        assert first["faulty_rewards:first_pixel"].values.tolist() == [1, 2, 3]
        assert second[spec.name].values.tolist() == [1, 1]
        assert pool.failures == 3
        assert {**ANSWERS, **BREAKDOWNS}[fault] in pool.last_error
        assert (pool.workers.pids == before) == (fault == "nan")


def test_details_of_a_batch_without_scores_are_kept():
    with pool_of(RewardSpec("faulty_rewards:Unscored"), retries=1) as pool:
        (scores,) = pool.gather([pool.submit(*batch(1, 2))])
    assert np.isnan(scores["faulty_rewards:Unscored"].values).all() and pool.failures == 2
    assert scores["faulty_rewards:Unscored"].details == [
        "not scored: no prompt 1",
        "not scored: no prompt 2",
    ]


def test_partly_nan_keeps_the_rest():
    with pool_of("faulty_rewards:PartlyNan") as pool:
        pool.wait_ready()
        before = pool.workers.pids
        (scores,) = pool.gather([pool.submit(*batch(1, 2, 3))])
        values = scores["faulty_rewards:PartlyNan"].values
        assert np.isnan(values).tolist() == [True, False, False]
        assert pool.failures == 1 and pool.workers.pids == before


def test_idle_worker_killed_from_outside():
    with pool_of("faulty_rewards:first_pixel") as pool:
        pool.wait_ready()
        os.kill(pool.workers.pids[0], signal.SIGKILL)
        (scores,) = pool.gather([pool.submit(*batch(9))])
        assert scores["faulty_rewards:first_pixel"].values.tolist() == [9]
        assert pool.failures == 0


def test_stopped_worker_with_a_batch_larger_than_the_pipe():
    """A worker that does not even read must not block the pool: the time-out covers the sending
    too."""
    with pool_of("faulty_rewards:first_pixel", timeout_s=2.0) as pool:
        pool.wait_ready()
        os.kill(pool.workers.pids[0], signal.SIGSTOP)
        images = np.full((2, 512, 512, 3), 6, np.uint8)
        (scores,) = pool.gather([pool.submit(images, ["a", "b"], [{}, {}])])
        assert scores["faulty_rewards:first_pixel"].values.tolist() == [6, 6]


def test_metadata_that_cannot_travel():
    images, prompts, _ = batch(1)
    with pool_of("faulty_rewards:first_pixel", retries=0) as pool:
        (scores,) = pool.gather([pool.submit(images, prompts, [{"f": lambda: 0}])])
        assert np.isnan(scores["faulty_rewards:first_pixel"].values).all()
        assert "pickle" in pool.last_error


def test_start_failure_is_told():
    with pool_of("faulty_rewards:NeverStarts", workers=2) as pool:
        with pytest.raises(
            UserError,
            match=(
                "rewards.faulty_rewards:NeverStarts: could not start: ImportError: No module named"
                " 'left_pad'"
            ),
        ):
            pool.wait_ready()
        ticket = pool.submit(*batch(1))
        with pytest.raises(UserError, match="left_pad"):
            pool.gather([ticket])
    with pytest.raises(UserError, match="left_pad"):
        pool_of("faulty_rewards:NeverStarts", workers=0)


def test_start_that_hangs_is_told():
    with pool_of("faulty_rewards:StartsSlowly", start_timeout_s=1.0) as pool:
        with pytest.raises(
            UserError, match=r"did not load its rewards within 1 s \(start_timeout_s\)"
        ):
            pool.wait_ready()


def test_bad_options_are_refused_before_any_process():
    with pytest.raises(UserError, match="rewards.ocr.detct"):
        pool_of(RewardSpec("ocr", 1.0, {"detct": True}))
    with pytest.raises(UserError, match="0 or more"):
        pool_of("jpeg", workers=-1)


def test_no_workers_lets_exceptions_through(tmp_path):
    with pool_of(faulty(tmp_path, "raising", times=1), workers=0) as pool:
        with pytest.raises(ValueError, match="no idea"):
            pool.submit(*batch(1))


@pytest.mark.parametrize(
    "images, prompts",
    [
        (np.zeros((2, 4, 4, 3), np.float32), ["a", "b"]),
        (np.zeros((4, 4, 3), np.uint8), ["a"]),
        (np.zeros((2, 3, 4, 4), np.uint8), ["a", "b"]),
        (np.zeros((2, 4, 4, 3), np.uint8), ["a"]),
    ],
)
def test_batches_that_make_no_sense(images, prompts):
    with pool_of("jpeg", workers=0) as pool:
        with pytest.raises(ValueError):
            pool.submit(images, prompts, [{} for _ in prompts])


def test_close_with_work_in_flight():
    pool = pool_of(RewardSpec("faulty_rewards:Slow", 1.0, {"seconds": 60}))
    pool.wait_ready()
    pids = pool.workers.pids
    tickets = [pool.submit(*batch(1)) for _ in range(3)]
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 10 and not any(alive(pid) for pid in pids)
    assert all(
        np.isnan(scores["faulty_rewards:Slow"].values).all() for scores in pool.gather(tickets)
    )
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(*batch(1))


def test_close_while_starting():
    pool = pool_of("faulty_rewards:StartsSlowly")
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 10 and pool.workers.pids == []


PARENT = """
import os, signal, sys, time, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
sys.path.insert(0, {here!r})
from tempflow.rewards import RewardPool, RewardSpec
pool = RewardPool([RewardSpec("faulty_rewards:Slow", 1.0, {{"seconds": {seconds}}})], workers=2)
pool.wait_ready()
ticket = pool.submit(np.zeros((1, 4, 4, 3), np.uint8), [""], [{{}}])
if {fork} and os.fork() == 0:
    time.sleep(15)
    os._exit(0)
try:
    print(*pool.workers.pids, flush=True)
    while True:
        time.sleep(0.1)
except KeyboardInterrupt:
    print(pool.gather([ticket])[0]["faulty_rewards:Slow"].values[0], flush=True)
"""


def start_parent(seconds, fork=False):
    code = PARENT.format(here=os.path.dirname(__file__), seconds=seconds, fork=fork)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    return parent, pids


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "forked"])
def test_killed_parent_leaves_no_orphans(fork):
    """One worker is busy for long, one is idle; both go with their parent, even when a fork of it
    lives on."""
    parent, pids = start_parent(seconds=3600, fork=fork)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(alive(pid) for pid in pids), seconds=12)


def test_ctrl_c_leaves_the_workers_to_the_parent():
    """SIGINT to the terminal's process group, and SIGTERM to the workers: the scores still
    arrive."""
    parent, pids = start_parent(seconds=1.0)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.stdout.readline().strip() == "1.0"
    assert parent.wait(timeout=10) == 0
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_ocr_through_the_pool():
    """A worker loads the real reader and scores a blank picture as a wrong answer, not as a
    failure."""
    with pool_of(RewardSpec("ocr", 1.0, {"detect": False})) as pool:
        images = np.full((3, 32, 96, 3), 200, np.uint8)
        (scores,) = pool.gather([pool.submit(images, ['the word "ABC"'] * 3, [{}] * 3)])
        assert scores["ocr"].values.tolist() == [0, 0, 0] and pool.failures == 0
