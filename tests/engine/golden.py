"""Golden bits: what short runs of every method compute, recorded so that a change of structure can
prove it changed nothing.

    python tests/engine/golden.py [--only NAME ...]      run the cases and compare them with
        golden.json
    python tests/engine/golden.py --record [--only ...]  write what they give now

A case is a training run of a few iterations of a tiny model. Recorded are every row of its metrics
less what depends on the clock, at full precision, and a SHA-256 of the weights (and the average) of
its last checkpoint. The bits hold for the processor, the number of cores and the torch version that
are recorded beside them; elsewhere only the metrics are compared, to a tolerance that another order
of sums stays within.

A commit that changes recorded bits on purpose records them anew and says which cases changed and
why. Metrics that are added or removed are reported, and are no failure: names may move, values may
not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "golden.json"
CLOSE = 2e-2  # relative, on another processor

for _folder in (HERE, HERE.parents[1] / "recipes", HERE.parents[1] / "benchmarks"):
    # appended: benchmarks/kernels.py must not pass for Hugging Face's package
    sys.path.append(str(_folder))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

TWO_REWARDS = {"engine_rewards:contrast": 1.0, "engine_rewards:warmth": 0.5}
LORA = {"lora": {"rank": 4, "alpha": 8}}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "torch_adam": True}}
OFFLOAD = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def zero(stage: int, **more) -> dict:
    return {"optimizer": ADAMW, "zero_optimization": {"stage": stage, **more}}


# Changes to engine_cases.config_table by case; "processes": ranks under the launcher (default: this
# process).
CASES: dict[str, dict] = {
    "tempflow_seed_groups": {},
    "tempflow_prompt_groups": {
        "training": {"advantage": {"over": "prompt", "global_std": True}, "weighting": "uniform"}
    },
    "flow_grpo": {
        "rollout": {"plan": {"type": "flow_grpo", "seeds": 4, "branch_steps": [0, 4, 8]}},
        "training": {"advantage": {"over": "prompt"}},
    },
    "mix_grpo": {
        "rollout": {"plan": {"type": "mix_grpo", "seeds": 4, "window": 3, "every": 2}},
        "training": {"advantage": {"over": "prompt"}},
    },
    "random_steps_dance": {
        "rollout": {"plan": {"branch_steps": {"random": 3}, "children": 3}, "sde": "dance"}
    },
    "lora_kl_x": {"model": LORA, "training": {"penalty": {"coef": 0.04}, "updates": {"passes": 2}}},
    "full_kl_v_cps": {
        "rollout": {"sde": "cps"},
        "training": {"penalty": {"coef": 0.04, "form": "v"}, "updates": {"passes": 2}},
    },
    "guard": {
        "training": {
            "objective": {"ratio": "guard"},
            "updates": {"passes": 3},
            "ema": {"decay": 0.9, "every": 2},
        }
    },
    "gdpo": {"rewards": TWO_REWARDS, "training": {"advantage": "gdpo"}},
    "suffix_order_1": {"rollout": {"suffix": {"stride": 3, "order": 1, "audit_every": 2}}},
    "suffix_order_2": {"rollout": {"suffix": {"stride": 2, "order": 2, "exact_steps": 1}}},
    "zero_2_two_ranks": {"processes": 2, "deepspeed": zero(2)},
    "zero_3_two_ranks_lora": {
        "processes": 2,
        "model": LORA,
        "training": {"penalty": {"coef": 0.04}},
        "deepspeed": zero(3),
    },
    "offload_two_ranks": {"processes": 2, "deepspeed": OFFLOAD},
    "sd3": {"family": "sd3", "rollout": {"guidance_scale": 4.5}},
    "qwen_image": {"family": "qwen_image", "rollout": {"guidance_scale": 4.0}, "model": LORA},
    "resumed": {"resume_at": 2},
}
ITERATIONS = 4


def run_case(name: str, folder: Path) -> dict:
    """Run a case in `folder`; {"rows": metrics without the clock, "weights": sha256, "ema": sha256
    or None}."""
    from run_cases import timeless, train

    changes = {
        key: dict(value) if isinstance(value, dict) else value for key, value in CASES[name].items()
    }
    processes, resume_at = changes.pop("processes", None), changes.pop("resume_at", None)
    family = changes.pop("family", None)
    if family:
        changes["model"] = changes.get("model", {}) | _tiny(family, folder)
        changes["rollout"] = {"height": 32, "width": 64} | changes["rollout"]
    # else by cores, which shapes batches
    changes["rollout"] = {"lanes": 1 if processes else 2} | changes.get("rollout", {})
    changes["training"] = {"iterations": ITERATIONS} | changes.get("training", {})
    if resume_at:
        train(
            folder,
            name,
            processes=processes,
            **changes | {"training": changes["training"] | {"iterations": resume_at}},
        )
        run = train(folder, name, "--resume", processes=processes, **changes)
    else:
        run = train(folder, name, processes=processes, **changes)
    last = run.folder / f"checkpoints/{run.checkpoints[-1]:06d}"
    ema = last / "ema.safetensors"
    return {
        "rows": [timeless(row) for row in run.rows],
        "weights": tensor_hash(last / "weights.safetensors"),
        "ema": tensor_hash(ema) if ema.exists() else None,
    }


def _tiny(family: str, folder: Path) -> dict:
    import family_cases

    return {
        "path": str(family_cases.FAMILIES[family].build(folder / "models" / family)),
        "max_sequence_length": 20,
    }


def tensor_hash(file: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, so that a file's header does not matter."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def machine() -> dict:
    """What bits depend on besides the code."""
    import torch

    from tempflow.run.environment import device_name

    return {
        "processor": device_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__.split("+")[0],
    }


def differences(want: dict, got: dict, exact: bool) -> list[str]:
    """What of `got` is not what was recorded, a line each."""
    found = []
    if exact:
        found += [
            f"{part} of the last checkpoint differ"
            for part in ("weights", "ema")
            if want[part] != got[part]
        ]
    if len(want["rows"]) != len(got["rows"]):
        return [*found, f"{len(got['rows'])} rows of metrics, recorded were {len(want['rows'])}"]
    for old, new in zip(want["rows"], got["rows"], strict=True):
        for key in sorted(old.keys() & new.keys()):
            if not _same(old[key], new[key], exact):
                found.append(
                    f"iteration {old['iteration']}: {key} is {new[key]!r}, recorded was"
                    f" {old[key]!r}"
                )
    return found


def _same(old, new, exact: bool) -> bool:
    if exact or not (isinstance(old, float) and isinstance(new, float)):
        return old == new or (old != old and new != new)
    return math.isclose(old, new, rel_tol=CLOSE, abs_tol=CLOSE / 20)


def names_moved(want: dict, got: dict) -> list[str]:
    """Metrics that came or went."""
    old, new = ({key for row in side["rows"] for key in row} for side in (want, got))
    return [*(f"- {key}" for key in sorted(old - new)), *(f"+ {key}" for key in sorted(new - old))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--record", action="store_true", help="write what the cases give now")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)}",
    )
    args = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else {"machine": machine(), "cases": {}}
    exact, failed = known["machine"] == machine(), 0
    if args.record and not exact:
        known = (
            {"machine": machine(), "cases": {}}
            if len(args.only) == len(CASES)
            else sys.exit(f"recorded on {known['machine']}")
        )
    if not exact and not args.record:
        print(
            f"recorded on {known['machine']}, this is {machine()}: metrics are compared to {CLOSE}"
        )
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            got = run_case(name, Path(folder))
        if args.record:
            known["cases"][name] = got
            FILE.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
            print(f"{name}: recorded", flush=True)
            continue
        found = differences(known["cases"][name], got, exact)
        failed += bool(found)
        print(
            "\n  ".join(
                [
                    f"{name}: {'DIFFERS' if found else 'same'}",
                    *found[:12],
                    *names_moved(known["cases"][name], got),
                ]
            ),
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
