"""A run goes on on another number of ranks as if nothing had happened, on one machine or on two."""

import json
import shutil
import subprocess

import deepspeed
import pytest
import torch
from elastic_cases import ADAMW, BEGINNING, END, MIDDLE, MOVED, Toy
from engine_cases import HERE, ROOT, write_config
from run_cases import FEW_STEPS, TIMEOUT_S, Run, environment, free_port, ranks, train
from safetensors import safe_open
from safetensors.torch import load_file

from tempflow.checkpoints import find, load, manifest
from tempflow.errors import UserError
from tempflow.training import distributed

pytestmark = pytest.mark.cpu  # two ranks on any machine, compared to the last bit
ROUNDING = 1e-5  # relative, fp32
BF16 = 2e-2  # gradients of half the rows, rounded to bf16 before they are summed


@pytest.fixture(scope="session", autouse=True)
def one_rank():
    distributed.init_distributed()


def test_no_compiler_is_needed_to_start():
    """DeepSpeed's own all-reduce for CPUs would be compiled at the first start, behind a lock that
    outlives a kill."""
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def distance(a: dict, b: dict) -> float:
    """The largest relative difference of two tables' tensors."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


# ---------------------------------------------------------------------- every stage, there and back
@pytest.fixture(scope="module")  # it holds some 200 MB of weights and moments
def passed_on(tmp_path_factory):
    """By case: what one rank saved after 2 updates and held after 6, undisturbed; then two ranks
    made updates 3 and 4."""
    folder, undisturbed = tmp_path_factory.mktemp("elastic"), {}
    for case in MOVED:
        toy = Toy(case)
        toy.train(BEGINNING)
        saved = toy.save(folder / case, BEGINNING.stop)
        norms = toy.train(range(MIDDLE.start, END.stop))
        undisturbed[case] = saved, norms, toy.held()
        toy.close()
    for number, size in enumerate((5, 5000, 0, 300, 70)):
        file = folder / f"sealed/part-{number % 2}/{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * size)
    done = ranks(2, HERE / "elastic_cases.py", folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder, undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("case", MOVED)
def test_there_and_back(passed_on, case):
    """From one rank to two and back: each starts from the very bits the other left, and all six
    updates are as if undisturbed."""
    folder, undisturbed = passed_on
    saved, norms, end = undisturbed[case]
    tolerance = BF16 if "bf16" in case else ROUNDING
    with safe_open(folder / case / "restored.safetensors", "pt") as file:
        notes = file.metadata()["notes"]
    assert notes == "checkpoint 000002 was written by 1 rank and is resumed on 2"
    assert same(load_file(folder / case / "restored.safetensors"), saved)

    toy = Toy(case, seed=2)
    assert toy.restore(folder / case) == [
        "checkpoint 000004 was written by 2 ranks and is resumed on 1"
    ]
    assert same(toy.held(), load_file(folder / case / "saved.safetensors"))
    middle = load_file(folder / case / "norms.safetensors")["norms"]
    assert torch.cat([middle, toy.train(END)]).tolist() == pytest.approx(
        norms.tolist(), rel=tolerance
    )
    assert distance(toy.held(), end) < tolerance
    assert distance(end, saved) > 0.1, "the updates since do something"
    toy.close()
    assert not list((folder / case / "checkpoints").glob(".*")), "nothing converted is left behind"


@pytest.mark.slow
def test_ranks_seal_a_checkpoint_together(passed_on):
    """Each reads a share, the largest files apart; the manifest is the one that a single rank
    makes."""
    folder = passed_on[0]
    shares = [json.loads((folder / f"read-{rank}.json").read_text()) for rank in (0, 1)]
    assert shares == [
        ["part-1/1.bin", "part-0/4.bin", "part-0/2.bin"],
        ["part-1/3.bin", "part-0/0.bin"],
    ]
    assert manifest.problem_with(folder / "sealed") is None
    together = (folder / "sealed" / manifest.MANIFEST).read_text()
    (folder / "sealed" / manifest.MANIFEST).unlink()
    manifest.seal(folder / "sealed")
    assert (folder / "sealed" / manifest.MANIFEST).read_text() == together


@pytest.mark.slow
def test_a_folder_of_each_rank_is_refused(passed_on):
    errors = [(passed_on[0] / f"apart/{rank}/error.txt").read_text() for rank in (0, 1)]
    assert (
        errors
        == [
            "logging.dir: runs/run is not the same folder for all ranks; it must be on a file"
            " system they share"
        ]
        * 2
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_weights_are_not_saved_with_adapters(tmp_path, stage):
    toy = Toy(f"lora-zero{stage}")
    toy.train(BEGINNING)
    toy.save(tmp_path, BEGINNING.stop)
    (found,) = find.folders(tmp_path)
    written = sum(
        file.stat().st_size for file in (found / "deepspeed").rglob("*") if file.is_file()
    )
    frozen = 4 * sum(
        getattr(p, "ds_numel", p.numel())
        for p in toy.runtime.module.parameters()
        if not p.requires_grad
    )
    toy.close()
    assert written < frozen / 2


# -------------------------------------------------------------------------------------- conversions
def sharded(folder, case="lora-zero2", **more):
    """A checkpoint that says it is of three ranks, and a Runtime of one to restore it."""
    toy = Toy(case, **more)
    toy.train(BEGINNING)
    held = toy.save(folder, BEGINNING.stop)
    (found,) = find.folders(folder)
    state = load.read_state(found) | {"world_size": 3}
    (found / "state.json").write_text(json.dumps(state))
    (found / manifest.MANIFEST).unlink()
    manifest.seal(found)
    return toy, found, held


def test_a_broken_conversion_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    toy, found, held = sharded(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("deepspeed.checkpoint.ds_to_universal._save_checkpoint", full)
        with pytest.raises(
            UserError,
            match="3 ranks.*converted for 1: OSError.*No space left.*Resume with 3.*unchanged",
        ):
            toy.restore(tmp_path)
    assert manifest.problem_with(found) is None and not list((tmp_path / "checkpoints").glob(".*"))
    # as a kill leaves it
    (tmp_path / f"checkpoints/.universal-{found.name}/state").mkdir(parents=True)
    toy.restore(tmp_path)
    assert same(toy.held(), held) and not list((tmp_path / "checkpoints").glob(".*"))
    toy.close()


def test_an_optimizer_that_cannot_be_converted_is_named(tmp_path):
    toy, found, _ = sharded(
        tmp_path, optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    )
    with pytest.raises(UserError, match="could not be converted for 1: .*SGD"):
        toy.restore(tmp_path)
    assert manifest.problem_with(found) is None
    toy.close()


# --------------------------------------------------------------- whole runs, and more than one node
def settings(folder, name):
    """Whole iterations at ZeRO-3; no ratio comes near its bounds, where rounding would decide."""
    return {
        "rollout": FEW_STEPS,
        "training": {
            "iterations": 4,
            "updates": {"passes": 2},
            "objective": {"clip_low": 0.2, "clip_high": 0.2},
            "penalty": {"coef": 0.1},
            "ema": {"decay": 0.5, "every": 3},
        },
        "deepspeed": {
            "optimizer": ADAMW,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
        "eval": {"every": 0},
        "checkpoint": {"every": 2, "keep": 9},
        "logging": {"dir": str(folder), "name": name},
    }


def launch_nodes(folder, *arguments) -> subprocess.CompletedProcess:
    """engine/train.py on two "nodes" of one rank each: a launcher for each, without ssh. Returns
    the first one's end."""
    hostfile = folder / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    command = [
        "deepspeed",
        "--hostfile",
        hostfile,
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
    ]
    nodes = []
    for rank in range(2):
        line = [*command, "--node_rank", rank, ROOT / "engine/train.py", *arguments]
        nodes.append(
            subprocess.Popen(
                list(map(str, line)),
                env=environment(),
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        texts = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert nodes[1].returncode == nodes[0].returncode, texts[1][-4000:]
    return subprocess.CompletedProcess(command, nodes[0].returncode, texts[0], texts[1])


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run of one rank, and a copy of it that was taken up after iteration 2 by two ranks, each
    with a launcher of its own."""
    folder = tmp_path_factory.mktemp("moved")
    alone = train(folder, "alone", processes=None, **settings(folder, "alone"))
    name = "two-nodes"
    shutil.copytree(alone.folder, folder / name)
    shutil.rmtree(folder / name / "checkpoints/000004")
    done = launch_nodes(
        folder,
        "--config",
        write_config(folder, f"{name}.json", **settings(folder, name)),
        "--resume",
    )
    assert "checkpoint 000002 was written by 1 rank and is resumed on 2" in done.stdout
    return {"alone": alone, name: Run(folder / name, done)}


def assert_equal_runs(one: Run, other: Run):
    """To rounding. Rewards are read from pictures of 256 levels, one of which is 1e-4 of a
    picture's reward; advantages are differences of such rewards."""
    assert [row["iteration"] for row in other.rows] == [row["iteration"] for row in one.rows]
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.keys() == b.keys()
        for key in (key for key in a if not key.startswith("time/") and key not in PER_RANK):
            scale = 1e-4 if key.startswith(("reward", "advantage")) else ROUNDING
            assert b[key] == pytest.approx(a[key], rel=ROUNDING, abs=scale), (a["iteration"], key)
    for name in ("weights", "ema"):
        assert distance(other.weights(name=name), one.weights(name=name)) < ROUNDING


PER_RANK = ("rollout/rows_per_forward", "rollout/peak_latents")


@pytest.mark.slow
def test_a_run_goes_on_on_two_nodes(moved):
    """Two ranks of one launcher: `test_there_and_back`."""
    assert_equal_runs(moved["alone"], moved["two-nodes"])
    assert len(moved["two-nodes"].done.stdout) > len(moved["two-nodes"].done.stderr), (
        "the second node keeps quiet"
    )


@pytest.mark.slow
def test_a_run_goes_on_on_one_rank(moved):
    """And back: one more iteration of each on one rank."""
    ends = []
    for name in ("alone", "two-nodes"):
        folder = moved[name].folder.parent
        more = ["--resume", "--set", "training.iterations=5"]
        ends.append(train(folder, name, *more, processes=None, **settings(folder, name)))
    assert (
        "written by 2 ranks and is resumed on 1" in ends[1].done.stdout
        and "resumed on" not in ends[0].done.stdout
    )
    assert ends[0].rows[-1]["iteration"] == 5
    assert_equal_runs(*ends)
