"""What the environment says of the launch: what is wrong is told in one message that names the
variable or the launcher's option."""

import os
import signal
import socket
import time

import deepspeed
import preloaded
import pytest
import torch.distributed as dist
from engine_cases import ROOT
from run_cases import environment, free_port

from tempflow import cli
from tempflow.errors import RankError, UserError
from tempflow.models.arguments import check_device
from tempflow.training import distributed
from tempflow_kernels import dispatch

VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture
def launched(monkeypatch):
    """The environment that a launcher makes, with changes; a value of None is left out."""

    def set_up(**changes):
        for name, value in {**VARIABLES, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_up


@pytest.mark.parametrize("taken", [1, 50])
def test_a_port_that_somebody_takes_first_is_not_the_end_of_a_run_alone(
    launched, monkeypatch, taken
):
    """Between a free port's being found and its use others may take it."""
    launched()  # so that what is set below is taken back
    launched(**dict.fromkeys(VARIABLES))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        tried = []

        def join(**_):
            tried.append(os.environ["MASTER_PORT"])
            if len(tried) <= taken:
                dist.TCPStore("127.0.0.1", other.getsockname()[1], 1, is_master=True)

        monkeypatch.setattr(deepspeed, "init_distributed", join)
        if taken == 1:
            distributed.init_distributed()
            assert len(set(tried)) == 2
        else:
            with pytest.raises(RankError, match="of 127.0.0.1 is taken"):
                distributed.init_distributed()
            assert len(tried) == distributed.PORTS


def test_a_port_that_is_taken(launched, monkeypatch):
    """With the error that torch's own store raises."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launched(MASTER_PORT=str(port))
        monkeypatch.setattr(
            deepspeed,
            "init_distributed",
            lambda **_: dist.TCPStore("127.0.0.1", port, 1, is_master=True),
        )
        with pytest.raises(
            RankError, match=f"port {port} of 127.0.0.1 is taken.*deepspeed --master_port PORT"
        ):
            distributed.init_distributed()


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError("The client socket has timed out after 60s\nstack"),
        dist.DistStoreError("wait timeout"),
        ValueError("invalid literal for int() with base 10: 'x'"),
        OSError("no route to host"),
        RuntimeError("Gloo: unable to resolve"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_ranks_that_cannot_be_reached(launched, monkeypatch, error):
    launched(RANK="3", MASTER_ADDR="127.0.0.2", MASTER_PORT="29500")

    def fail(**_):
        raise error

    monkeypatch.setattr(deepspeed, "init_distributed", fail)
    with pytest.raises(RankError) as refused:
        distributed.init_distributed()
    words = [
        "rank 3",
        "127.0.0.2:29500",
        type(error).__name__,
        str(error).splitlines()[0],
        "--master_addr",
        "GLOO_SOCKET_IFNAME",
    ]
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value), (
        refused.value
    )


def test_an_address_that_nobody_knows(launched, monkeypatch):
    launched(RANK="0", WORLD_SIZE="2", MASTER_ADDR="no host")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: pytest.fail("waits for minutes"))
    with pytest.raises(
        RankError, match="rank 0 cannot join the others at no host:1 .*--master_addr"
    ):
        distributed.init_distributed()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_missing_ranks(tmp_path, kind):
    """With the handlers that training installs before; the wait has begun once the store
    listens."""
    file, port, out = tmp_path / "waiting.py", free_port(), tmp_path / "out"
    file.write_text(
        "from tempflow.training import distributed; from tempflow.training.signals import"
        " StopSignal; StopSignal().install(); distributed.init_distributed()"
    )
    env = environment() | VARIABLES | {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    waiting = preloaded.start(0, [str(file)], env, str(ROOT), out, out)
    try:
        while waiting.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            time.sleep(0.1)
        waiting.send_signal(kind)
        assert preloaded.supervise([waiting], 60) == -kind
    finally:
        waiting.kill()


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_launch_variables_that_are_incomplete(launched, monkeypatch, missing):
    launched(**{missing: None})
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: pytest.fail("asked for MPI"))
    with pytest.raises(UserError, match=f"has RANK=.* but not {missing}"):
        distributed.init_distributed()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "\u0663"])
def test_launch_variables_that_are_no_numbers(launched, monkeypatch, capsys, name, value):
    launched(**{name: value})
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: pytest.fail("begun"))
    assert end.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: environment variable {name}: expected a whole number, as launchers set it, got"
        f" {value!r}\n"
    )


@pytest.mark.parametrize(
    "choice, words",
    [
        ("gpu", "expected one of auto, reference, triton"),
        ("", "expected one of"),
        ("triton", "cannot run on cpu"),
    ],
)
def test_kernels_that_cannot_run(monkeypatch, choice, words):
    """Before a model is loaded, and not at the first step of the first rollout."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device_type: "it is not installed")
    monkeypatch.setenv("TEMPFLOW_KERNELS", choice)
    with pytest.raises(UserError, match=f"TEMPFLOW_KERNELS=.*{words}"):
        check_device("cpu")
