"""The rehearsal of graph captures: its rollout for every family with the capture stood in for, and
what becomes of its answers."""

import io
import json
import sys

import pytest
import torch
from engine_cases import MODEL, ROOT, examples, small_config
from family_cases import FAMILIES

from tempflow.config import load_config
from tempflow.models.hub import CARDS
from tempflow.run import directory
from tempflow.sampling import graphs
from tempflow.sampling.graphs import CannotCapture, Captured
from tempflow.training import rehearsal, rehearse
from tempflow.types import Size

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SUFFIX = {"stride": 2, "order": 2, "exact_steps": 1, "audit_every": 0, "weights": "float8"}


class Capture:
    """What a capture does on a CPU, and the names of the functions it was given."""

    def __init__(self, refuse=""):
        self.refuse, self.seen = refuse, []

    def __call__(self, function, inputs):
        self.seen.append((function.__qualname__.split(".")[-1], len(inputs["x"])))
        if self.refuse in self.seen[-1][0] and self.refuse:
            raise CannotCapture("a copy to the host")
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = function(**static)

        def replay():
            for buffer, value in zip(outputs, function(**static), strict=True):
                buffer.copy_(value)

        return Captured(static, outputs, replay, 10)


def config_of(folder, model=None, **rollout):
    plan = {"branch_steps": [0, 1]}
    rollout = {
        "num_steps": 4,
        "plan": plan,
        "graphs": True,
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
        **rollout,
    }
    return small_config(
        model={"path": str(folder), "max_sequence_length": 12, **(model or {})}, rollout=rollout
    )


@pytest.mark.usefixtures("small_condition_images")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_rollout_is_captured_in_two_layers(family_folders, name):
    capture, config = Capture(), config_of(family_folders(name))
    assert rehearse.rehearse(config, CPU, capture) is None
    assert capture.seen == [("step", 2)]
    table = rehearse.small_policy(config, CPU).denoiser().config
    layers = [table[key] for key in rehearse.LAYERS if key in table]
    assert layers == [1, 1] or layers == [2]


@pytest.mark.parametrize("card", ["flux-dev", "sd35-medium", "sd35-large", "qwen-image", "z-image"])
def test_two_layers_of_a_large_model_are_small(card):
    """Made without weights: 3 GB at most, beside which a GPU that is to hold the whole model has
    room."""
    policy = rehearse.small_policy(
        config_of(CARDS / card, {"dtype": "bfloat16"}), torch.device("meta")
    )
    weights = sum(p.nbytes for p in policy.transformer.parameters())
    assert 1e8 < weights < 3e9 and policy.velocity(
        policy.transformer,
        torch.empty(2, *policy.latent_shape(Size(256, 256)), device="meta"),
        torch.empty(2, device="meta"),
        policy.encode(examples(["one", "another"])),
        Size(256, 256),
        4.0,
    ).shape == (2, *policy.latent_shape(Size(256, 256)))


@pytest.mark.slow
def test_the_runs_own_settings_are_rehearsed():
    """Its dtype, its text length, and both functions of a rollout whose coarse steps take the
    float8 copy."""
    config = config_of(
        MODEL, {"dtype": "bfloat16", "attention_backend": "native"}, suffix=SUFFIX, height=64
    )
    capture = Capture()
    assert rehearse.rehearse(config, CPU, capture) is None
    assert {name for name, _ in capture.seen} == {"step", "coarse_step"}
    policy = rehearse.small_policy(config, CPU)
    assert policy.dtype == torch.bfloat16 and policy.embed(examples(["a"]))[
        "encoder_hidden_states"
    ].shape[:2] == (1, 12)


def test_a_refusal_comes_back_as_the_reason():
    reason = rehearse.rehearse(config_of(MODEL), CPU, Capture(refuse="step"))
    assert (
        reason
        == "a forward of 2 rows cannot be captured (a copy to the host); such forwards run eagerly"
    )


def test_no_size_is_larger_than_it_must_be():
    stop = {"metric": "eval/reward", "above": 1.0}
    config = small_config(
        rollout={"height": 1024, "width": 64, "plan": {"branch_steps": "all"}}, eval={"stop": stop}
    )
    small = rehearse.small_config(config, 48)
    assert (small.rollout.height, small.rollout.width) == (240, 64) and small.rewards == {
        "jpeg": 1.0
    }


# ---------------------------------------------------------------------------- between the processes
def said_by_the_child(monkeypatch, capsys, config, capture):
    """The child's main with its GPU stood in for."""
    request = {"config": json.loads(config.model_dump_json()), "device": "cpu"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(graphs, "CudaCapture", lambda: capture)
    rehearse.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(function, inputs):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    "capture, words",
    [
        (Capture(), None),
        (Capture("step"), "a copy to the host"),
        (fails, "not permitted when stream is capturing"),
    ],
)
def test_the_child_answers_in_one_line(monkeypatch, capsys, capture, words):
    answer = said_by_the_child(monkeypatch, capsys, config_of(MODEL), capture)["refusal"]
    assert answer is None if words is None else words in answer


def child(code):
    return [sys.executable, "-c", "import sys, json; request = json.load(sys.stdin); " + code]


@pytest.mark.parametrize(
    "code, reason",
    [
        ("print('words'); print(json.dumps({'refusal': None}))", None),
        (
            (
                "print(json.dumps({'refusal': request['device'] +"
                " request['config']['model']['path']}))"
            ),
            f"cuda:0{MODEL}",
        ),
        (
            "sys.exit('no kernel image is available')",
            "its process ended with status 1: no kernel image is available",
        ),
        ("import os; os.abort()", "its process ended with status -6: no output"),
        ("print('not JSON')", "its process ended with status 0: no output"),
    ],
)
def test_any_end_of_the_child_is_an_answer(code, reason):
    assert rehearsal.refusal(config_of(MODEL), GPU, child(code)) == reason


def test_a_child_that_hangs_is_an_answer():
    assert "longer than 0.5 s" in rehearsal.refusal(
        config_of(MODEL), GPU, child("import time; time.sleep(60)"), limit_s=0.5
    )


@pytest.mark.parametrize("answer, expected", [(None, True), ("no kernel image", False)])
def test_the_trainer_is_told_and_says_why(monkeypatch, answer, expected):
    notes = []
    monkeypatch.setattr(rehearsal, "refusal", lambda config, device: answer)
    assert rehearsal.may_capture(config_of(MODEL), GPU, notes.append) is expected
    assert [
        ("rollout.graphs" in note and "eagerly: no kernel image" in note) for note in notes
    ] == [True] * (not expected)
    monkeypatch.setattr(
        rehearsal, "refusal", lambda config, device: pytest.fail("there is nothing to rehearse")
    )
    assert rehearsal.may_capture(config_of(MODEL, graphs=False), GPU, notes.append)
    assert rehearsal.may_capture(config_of(MODEL), CPU, notes.append)


def test_a_refused_run_captures_nothing(policy, monkeypatch):
    from tempflow.models.embeddings import EmbeddingCache
    from tempflow.models.opened import Opened
    from tempflow.training import session
    from tempflow.types import Example

    notes = []
    monkeypatch.setattr(
        session,
        "open_model",
        lambda config, *given, **how: Opened(config, policy, EmbeddingCache(policy)),
    )
    monkeypatch.setattr(session, "Runtime", lambda *given: None)
    for may, said in ((False, []), (True, ["rollout.graphs: no GPU, so rollouts run eagerly"])):
        monkeypatch.setattr(session, "may_capture", lambda *given, may=may: may)
        made = session.build(
            config_of(MODEL), [Example("a")], [], [], pool=object(), note=notes.append
        )
        assert made.graphs is None and notes == said


def test_graphs_may_be_given_up_on_resume(tmp_path):
    """What the message of a failed capture advises."""
    logging = {"dir": str(tmp_path), "name": "run"}
    directory.claim(small_config(rollout={"graphs": True}, logging=logging), resume=False)
    directory.claim(small_config(rollout={"graphs": False}, logging=logging), resume=True)
    assert directory.read_config(tmp_path / "run").rollout.graphs is False


@pytest.mark.parametrize("name", ["flux_zero3", "flux_lora", "flux_first"])
def test_the_flux_configs_capture(name):
    assert load_config(ROOT / f"configs/{name}.json").rollout.graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rehearsal_on_hardware(dtype):
    assert rehearsal.refusal(config_of(MODEL, {"dtype": dtype}), GPU) is None
