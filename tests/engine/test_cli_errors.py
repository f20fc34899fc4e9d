"""Bad input to the scripts: one message that names it and what is allowed, status 2, before any
model is loaded.

Every case uses a model folder without weights (`skeleton`), so a script that began to load one
would say something else.
"""

import json
import subprocess
import sys

import pytest
from engine_cases import HELDOUT, ROOT, config_table, small_config, write_config
from run_cases import file_apart, script_here

from tempflow import cli
from tempflow.errors import RankError, UserError
from tempflow.run import directory


def refused(words, name, *arguments):
    done = script_here(name, *arguments)
    text = done.stderr
    assert done.returncode == 2 and done.stdout == "", text
    assert text.startswith("error: ") and text.count("error:") == 1 and "Traceback" not in text, (
        text
    )
    assert all(str(word) in text for word in words), text


@pytest.fixture
def config_file(tmp_path, skeleton):
    """A config of the skeleton, whose runs go to tmp_path / "runs"."""

    def write(**changes):
        changes["model"] = {"path": str(skeleton), **changes.get("model", {})}
        changes["logging"] = {"dir": str(tmp_path / "runs"), **changes.get("logging", {})}
        return write_config(tmp_path, **changes)

    return write


# -------------------------------------------------------------------------------------------- train
CASES = {
    "unknown key": ("training.penalti=1", ["training.penalti", "did you mean 'penalty'"]),
    "unknown section": ("trainer.seed=1", ["trainer", "did you mean 'training'"]),
    "wrong type": ("training.iterations=many", ["training.iterations", "integer", "'many'"]),
    "no prompt file": ("data.train=nowhere.txt", ["data.train", "nowhere.txt", "does not exist"]),
    "no held-out file": (
        "data.heldout=nowhere.txt",
        ["data.heldout", "nowhere.txt", "does not exist"],
    ),
    "no children": (
        "rollout.plan.children=0",
        ["rollout.plan.children", "at least 1 and at most 64", "0"],
    ),
    "no seeds": ("rollout.plan.seeds=0", ["rollout.plan.seeds", "at least 1", "0"]),
    "steps outside the grid": (
        "rollout.plan.branch_steps=[0,9]",
        ["rollout.plan.branch_steps", "step 9", "0 to 8"],
    ),
    "unknown reward": ("rewards.orc=1.0", ["rewards", "'orc'", "did you mean 'ocr'"]),
    "reward option": (
        'rewards={"ocr": {"detekt": true}}',
        ["rewards.ocr.detekt", "did you mean 'detect'"],
    ),
    "weight of a reward": ('rewards={"ocr": "much"}', ["rewards.ocr", "finite number"]),
    "height": ("rollout.height=30", ["rollout.height", "30", "multiples of 8"]),
    "width": ("rollout.width=100", ["rollout.width", "100", "multiples of 8"]),
    "too many prompts": (
        "data.prompts_per_iteration=5000",
        ["data.prompts_per_iteration", "5000", "4000"],
    ),
    "no optimizer": ("deepspeed={}", ["deepspeed.optimizer", "missing"]),
    "key of deepspeed": (
        "deepspeed.zero_optimisation={}",
        ["deepspeed.zero_optimisation", "did you mean 'zero_optimization'"],
    ),
    "bucket": (
        "deepspeed.zero_optimization.reduce_bucket_size=big",
        ["deepspeed.zero_optimization.reduce_bucket_size", "'big'"],
    ),
    "setting": ("training.seed", ["--set training.seed", "section.key=value"]),
    "model folder": ("model.path=/nowhere", ["model.path", "/nowhere", "does not exist"]),
    "run directory": ("logging.dir=/dev/null/runs", ["logging.dir", "/dev/null", "not a folder"]),
    "run's name": (
        "logging.name=../outside",
        ["logging.name", "below logging.dir", "'../outside'"],
    ),
    "home": ("logging.dir=~nobody-here/runs", ["logging.dir", "~nobody-here/runs", "home folder"]),
}


@pytest.mark.parametrize("setting, words", CASES.values(), ids=CASES)
def test_train_refuses(config_file, tmp_path, setting, words):
    refused(words, "train", "--config", config_file(), "--set", setting)
    assert not (tmp_path / "runs").exists(), (
        "a refused run leaves no directory that would be in the way of the next"
    )


def test_train_refuses_a_config_that_is_not_there(tmp_path):
    refused(
        ["config file", tmp_path / "none.json", "does not exist"],
        "train",
        "--config",
        tmp_path / "none.json",
    )


def test_train_refuses_a_prompt_without_quoted_text(config_file, tmp_path):
    """With the file and the line, for the reward that needs it; another one does not mind."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('the word "ONE"\na cat\n')
    file = config_file(
        data={"train": str(prompts), "prompts_per_iteration": 1}, rewards={"ocr": 1.0}
    )
    refused(
        [f"{prompts}:2", "a cat", "no text in quotation marks", "'ocr'"], "train", "--config", file
    )
    heldout = ["--set", f"data.train={HELDOUT}", "--set", f"data.heldout={prompts}"]
    refused([f"{prompts}:2", "quotation marks"], "train", "--config", file, *heldout)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_train_refuses_a_model_that_lacks_a_component(config_file, skeleton, part):
    (skeleton / part).rename(skeleton.parent / "elsewhere")
    refused(
        ["model.path", skeleton, f"lacks the component {part}"], "train", "--config", config_file()
    )


def test_train_refuses_another_family(config_file, skeleton):
    index = json.loads((skeleton / "model_index.json").read_text())
    (skeleton / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "KandinskyPipeline"})
    )
    refused(["model.path", "KandinskyPipeline", "FluxPipeline"], "train", "--config", config_file())


def test_train_needs_a_config():
    done = script_here("train")
    assert done.returncode == 2 and "--config" in done.stderr


def test_the_skeleton_is_one(config_file):
    """What makes the cases above say that no model is loaded: with nothing wrong, it is the weights
    that are missed."""
    from tempflow.models import check_model, load_policy

    path = json.loads(config_file().read_text())["model"]["path"]
    assert check_model(path) == "FluxPipeline"
    with pytest.raises(UserError, match="has no tensor file"):
        load_policy(path)


def test_train_as_a_command(config_file, tmp_path):
    """The same through the shell, where the status and the output are the process's."""
    arguments = ["--config", str(config_file()), "--set", "training.itterations=3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "engine/train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0].startswith(
        "error: training.itterations: unknown key; did you mean 'iterations'?"
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_config_error_needs_no_torch(config_file):
    """The quick way out: nothing heavy is imported before the config, the prompts and the rewards
    are known to be right."""
    code = (
        "import sys; sys.argv = ['train.py', '--config', sys.argv[1], '--set', 'training.seed=x']\n"
        f"sys.path.insert(0, {str(ROOT / 'engine')!r})\n"
        "import train\n"
        "from tempflow.errors import UserError\n"
        "try: train.main()\n"
        "except UserError: print('refused', 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config_file())],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "refused False False", done.stdout + done.stderr


# ------------------------------------------------------------------------------------ run directory
def claimed(tmp_path, **changes):
    config = small_config(logging={"dir": str(tmp_path / "runs"), "name": "one"}, **changes)
    return config, tmp_path / "runs/one"


def test_claim_writes_the_resolved_config(tmp_path):
    config, run_dir = claimed(tmp_path)
    assert directory.claim(config, resume=False) == run_dir
    assert directory.read_config(run_dir) == config
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.json"]


def test_claim_refuses_a_directory_that_is_in_use(tmp_path):
    config, run_dir = claimed(tmp_path)
    directory.claim(config, resume=False)
    (run_dir / "metrics.jsonl").write_text('{"iteration": 1}\n')
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        directory.claim(claimed(tmp_path, training={"seed": 5})[0], resume=False)
    assert all(
        word in str(error.value) for word in (str(run_dir), "exists", "--resume", "logging.name")
    )
    assert (run_dir / "config.json").read_bytes() == before


def test_claim_takes_a_directory_in_which_nothing_began(tmp_path):
    """Empty, or as a start leaves it that fails while the model is loading: the mended config takes
    it over."""
    config, run_dir = claimed(tmp_path)
    run_dir.mkdir(parents=True)
    assert directory.claim(config, resume=False) == run_dir
    mended, _ = claimed(tmp_path, training={"seed": 5})
    assert (
        directory.claim(mended, resume=False) == run_dir
        and directory.read_config(run_dir) == mended
    )


def test_claim_refuses_a_file(tmp_path):
    config, run_dir = claimed(tmp_path)
    run_dir.parent.mkdir(parents=True)
    run_dir.write_text("")
    with pytest.raises(UserError, match="exists"):
        directory.claim(config, resume=False)


def test_resume_needs_a_run(tmp_path):
    config, run_dir = claimed(tmp_path)
    with pytest.raises(UserError, match="--resume: .*one holds no run"):
        directory.claim(config, resume=True)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "changes, key, was, now",
    [
        ({"training": {"seed": 5}}, "training.seed", "0", "5"),
        ({"rollout": {"sde": {"eta": 0.5}}}, "rollout.sde.eta", "0.7", "0.5"),
        ({"rewards": {"jpeg": 1.0}}, "rewards", "None", "1.0"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            "deepspeed.zero_optimization",
            "None",
            "2",
        ),
        (
            {"training": {"iterations": 9, "penalty": {"coef": 0.1}}},
            "training.penalty",
            "None",
            "0.1",
        ),
    ],
)
def test_resume_refuses_another_config(tmp_path, changes, key, was, now):
    directory.claim(claimed(tmp_path)[0], resume=False)
    with pytest.raises(UserError) as error:
        directory.claim(claimed(tmp_path, **changes)[0], resume=True)
    assert all(word in str(error.value) for word in ("--resume", key, was, now)), error.value


def test_resume_takes_what_may_change(tmp_path):
    directory.claim(claimed(tmp_path)[0], resume=False)
    config, _ = claimed(
        tmp_path, training={"iterations": 9, "minutes": 3.0}, checkpoint={"keep": 7}
    )
    run_dir = directory.claim(config, resume=True)
    assert directory.read_config(run_dir) == config


# ------------------------------------------------------------------------------------ other scripts
@pytest.fixture
def claimed_run(tmp_path, skeleton):
    """A run directory in which nothing was trained yet."""
    table = config_table(
        model={"path": str(skeleton)}, logging={"dir": str(tmp_path / "runs"), "name": "one"}
    )
    from tempflow.config import parse_config

    return directory.claim(parse_config(table), resume=False)


SCRIPTS = {"evaluate": [], "sample": ["--out", "pictures"], "export": ["--out", "model"]}
scripts = pytest.mark.parametrize("name, more", SCRIPTS.items(), ids=SCRIPTS)


@scripts
def test_scripts_refuse_what_is_no_run(tmp_path, monkeypatch, name, more):
    monkeypatch.chdir(tmp_path)
    refused([tmp_path / "nowhere", "no run directory"], name, "--run", tmp_path / "nowhere", *more)
    assert not list(tmp_path.iterdir())


@scripts
def test_scripts_refuse_a_run_without_checkpoints(claimed_run, tmp_path, monkeypatch, name, more):
    monkeypatch.chdir(tmp_path)
    refused([claimed_run, "no whole checkpoint"], name, "--run", claimed_run, *more)
    refused(
        ["--checkpoint 7", "this run has none"],
        name,
        "--run",
        claimed_run,
        "--checkpoint",
        7,
        *more,
    )


NO_NUMBERS = {
    "evaluate sample": [
        ("--count", "0"),
        ("--count", "9" * 40),
        ("--count", "1.5"),
        ("--num-steps", "-3"),
        ("--num-steps", "ten"),
        ("--num-steps", "100000"),
        ("--checkpoint", "-1"),
        ("--checkpoint", "9" * 40),
        ("--prompts", ""),
        ("--run", ""),
    ],
    "sample": [
        ("--seed", "-1"),
        ("--seed", "9" * 20),
        ("--seed", "1e3"),
        ("--seed", "9" * 100_000),
        ("--prompt", " "),
    ],
}


@pytest.mark.parametrize(
    "name, option, value",
    [
        pytest.param(name, *case, id=f"{name} {case[0]}={case[1][:20]}")
        for names, cases in NO_NUMBERS.items()
        for name in names.split()
        for case in cases
    ],
)
def test_options_that_cannot_be_meant(tmp_path, name, option, value):
    """Each is named in one line, with what is allowed, and nothing is loaded for it."""
    done = script_here(name, "--run", tmp_path, "--out", tmp_path / "out", f"{option}={value}")
    last = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 2
        and f"argument {option}: expected" in last
        and repr(value)[:20] in last
        and len(last) < 300
    )


def test_evaluate_refuses_missing_prompts(claimed_run, tmp_path):
    refused(
        ["--prompts", "nowhere.txt", "does not exist"],
        "evaluate",
        "--run",
        claimed_run,
        "--base",
        "--prompts",
        "nowhere.txt",
    )


def test_evaluate_refuses_prompts_that_a_reward_cannot_use(tmp_path, skeleton):
    """Before the model is loaded, as train.py does; of a file, those that count."""
    from tempflow.config import parse_config

    table = config_table(
        model={"path": str(skeleton)},
        rewards={"ocr": 1.0},
        logging={"dir": str(tmp_path / "runs"), "name": "one"},
    )
    run = directory.claim(parse_config(table), resume=False)
    prompts = tmp_path / "plain.txt"
    prompts.write_text('the word "ONE"\na grey heron\n')
    arguments = ["--run", run, "--base", "--prompts", prompts]
    refused(
        [f"{prompts}:2", "'a grey heron'", "no text in quotation marks", "'ocr'"],
        "evaluate",
        *arguments,
    )
    done = script_here("evaluate", *arguments, "--count", 1)
    assert (
        done.stderr.startswith("note: OCR targets: 'ONE'\n")
        and "\nerror: model.path" in done.stderr
    ), done.stderr


@pytest.mark.parametrize(
    "rank, local, error, printed",
    [
        (0, 0, UserError, True),
        (1, 1, UserError, False),
        (8, 0, UserError, True),
        (9, 1, RankError, True),
    ],
)
def test_one_message_on_each_machine(monkeypatch, capsys, rank, local, error, printed):
    """Of an error that all ranks share; one that a rank has alone is printed whatever the rank."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(cli, "in_process_group", lambda: False)

    def main():
        raise error("refused")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2 and capsys.readouterr().err == (
        "error: refused\n" if printed else ""
    )


@pytest.mark.cpu  # gloo's threads
@pytest.mark.parametrize(
    "main, status, error",
    [("lambda: 0", 0, ""), ("refuse", 2, "error: refused"), ("fail", 1, "KeyError: 7")],
)
def test_the_end_of_a_rank(tmp_path, main, status, error):
    """Exit handlers are run, the interpreter is not taken down: gloo's threads would abort in it. A
    good end leaves the group."""
    code = f"""
import atexit
import torch.distributed as dist
from tempflow import cli
from tempflow.errors import UserError
from tempflow.training.distributed import init_distributed

class Last:
    def __del__(self):
        print("interpreter taken down", flush=True)

def refuse():
    raise UserError("refused")

def fail():
    return {{}}[7]

init_distributed()
last = Last()
atexit.register(lambda: print("joined" if dist.is_initialized() else "left"))
cli.run({main})
"""
    (tmp_path / "rank.py").write_text(code)
    done = file_apart(tmp_path / "rank.py")
    assert done.returncode == status and done.stdout.splitlines()[-1] == (
        "joined" if status else "left"
    ), done.stdout + done.stderr
    assert done.stderr.rstrip().endswith(error), done.stderr
