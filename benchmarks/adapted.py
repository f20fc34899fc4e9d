"""Compares three ways to compute a linear layer with a LoRA adapter: the adapter merged into the
weight, peft's layer, and the rollout's (`AdaptedLinear`).

    python benchmarks/adapted.py [--tokens 512] [--widths 1536 3072] [--rank 32]

For each width and dtype it prints the time of a forward as a ratio to the merged layer's, measured
in turn; the relative distance of the output from float64; and the share of the merged base's
weights that differ after the adapter was subtracted again. On a CPU the time is processor time.
"""

import argparse
import time

import torch
from peft import LoraConfig, inject_adapter_in_model

from tempflow.models.adapted import AdaptedLinear, whole_weight


def layers(width: int, rank: int, dtype: torch.dtype, device: str) -> dict[str, torch.nn.Module]:
    """The same function, computed in each of the three ways."""
    source = torch.nn.Linear(width, width, dtype=dtype, device=device).requires_grad_(False)
    adapted = AdaptedLinear(source, rank, 2.0)
    adapted.down.normal_(std=1 / rank), adapted.up.normal_(std=2e-3)
    merged = torch.nn.Linear(width, width, dtype=dtype, device=device).requires_grad_(False)
    merged.weight.copy_(whole_weight(adapted)), merged.bias.copy_(source.bias)
    holder = torch.nn.ModuleDict({"layer": source})
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"]), holder
    )
    peft = holder["layer"]
    (
        peft.lora_A["default"].weight.copy_(adapted.down),
        peft.lora_B["default"].weight.copy_(adapted.up),
    )
    return {"merged": merged, "peft": peft.to(dtype), "adapted": adapted}


def seconds(function, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


@torch.no_grad()
def measure(
    tokens: int, width: int, rank: int, dtype: torch.dtype, device: str, rounds: int
) -> dict:
    ways = layers(width, rank, dtype, device)
    adapted, x = ways["adapted"], torch.randn(tokens, width, device=device).to(dtype)
    exact = x.double() @ adapted.weight.double().T + adapted.bias.double()
    exact += adapted.scale * (x.double() @ adapted.down.double().T) @ adapted.up.double().T
    times = {name: min(t) for name, t in _in_turn(ways, x, device, rounds).items()}
    change = adapted.scale * (adapted.up.float() @ adapted.down.float())
    restored = (ways["merged"].weight.float() - change).to(dtype)
    return {
        "time": {name: t / times["merged"] for name, t in times.items()},
        "distance": {
            name: ((layer(x).double() - exact).norm() / exact.norm()).item()
            for name, layer in ways.items()
        },
        "not restored": (restored != adapted.weight).float().mean().item(),
    }


def _in_turn(ways: dict, x: torch.Tensor, device: str, rounds: int) -> dict[str, list[float]]:
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, layer in ways.items():
            times[name].append(seconds(lambda layer=layer: layer(x), device))
    return {name: taken[1:] for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="+", default=[1536, 3072])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        for width in args.widths:
            found = measure(args.tokens, width, args.rank, dtype, device, args.rounds)
            told = "; ".join(
                f"{name} {found['time'][name]:.3f} x, {found['distance'][name]:.2e}"
                for name in found["time"]
            )
            print(
                f"{dtype} {width}: {told}; not restored by subtracting {found['not restored']:.1%}"
            )


if __name__ == "__main__":
    main()
