"""Which signals let a run stop at a safe point."""

import os
import signal

import pytest

from tempflow.training.signals import StopSignal

KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    before = {kind: signal.getsignal(kind) for kind in KINDS}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_is_remembered(kind):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopSignal().install()
    assert not stop()
    os.kill(os.getpid(), kind)
    assert stop() and stop.received == kind.name


def test_a_terminal_may_close_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal().install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop()
