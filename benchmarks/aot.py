"""Compiles the kernels for GPUs that need not be present, and analyzes the machine code: `python
benchmarks/aot.py`.

There is one row per kernel specialization and target: registers, spills, local and shared memory,
the widths of global accesses, and for kernels that make noise the instructions per element. `--json
FILE` also writes the rows as data. It needs triton with its bundled cuobjdump and nvdisasm, no GPU,
and TRITON_INTERPRET unset. It says nothing about speed on hardware.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tempflow_kernels import triton_group_loss, triton_noise, triton_sde_step
from tempflow_kernels.triton_common import PARTS

CUDA_ARCHITECTURES = (80, 90, 100)
HIP_ARCHITECTURE = "gfx942"
PHILOX_MULTIPLIER = re.compile(r"-0x2daee0ad|0xd2511f53")
INTEGERS = {"numel", "rows", "children", "blocks"}
ROW = {"numel": 16}  # a multiple of 16, as FLUX's and SD3's rows are
FLOATS = {"lower", "upper", "kl_coef", "inv_numel", "inv_rows", "inv_children"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the dtypes of its pointers (fp32 if not given), its constants, and the sizes
    for which the launcher would specialize it: a size of 1 becomes a constant, and the compiler is
    told of a multiple of 16; other sizes stay general."""

    name: str
    kernel: object
    module: object
    pointers: dict
    constants: dict
    sizes: dict = field(default_factory=lambda: ROW)
    types: dict = field(init=False)

    def __post_init__(self):
        ones = {
            name: 1
            for name, size in self.sizes.items()
            if size == 1 and name in self.kernel.arg_names
        }
        object.__setattr__(self, "constants", {**self.constants, **ones})

        def type_of(name):
            if name in self.constants:
                return "constexpr"
            scalar = "i32" if name in INTEGERS else "fp32" if name in FLOATS else None
            return scalar or "*" + self.pointers.get(name, "fp32")

        object.__setattr__(self, "types", {name: type_of(name) for name in self.kernel.arg_names})

    @property
    def elements_per_thread(self):
        return self.module.BLOCK // (32 * self.module.NUM_WARPS)


def tiles(sizes):
    """Constants of a kernel that sums over children, of which there are 8 unless `sizes` says
    otherwise."""
    return {"TILE_B": triton.next_power_of_2(sizes.get("children", 8)), "PARTS": PARTS}


def step(name, x, velocity, x_next, sizes=ROW):
    pointers = {"x": x, "velocity": velocity, "x_next": x_next, "key": "i64", "counter": "i32"}
    width = 4 if {x, velocity, x_next} == {"fp32"} else 8
    constants = {"WIDTH": width, "BLOCK": triton_sde_step.BLOCK, **tiles(sizes)}
    return Variant(
        f"sde_step {name}",
        triton_sde_step.sde_step_kernel,
        triton_sde_step,
        pointers,
        constants,
        sizes,
    )


def latents(x, velocity, x_next):
    return {
        "x": x,
        "velocity": velocity,
        "velocity_ref": velocity,
        "velocity_old": velocity,
        "grad": velocity,
        "x_next": x_next,
        "counter": "i32",
    }


def forward(name, mode, kl, *dtypes, sizes=ROW):
    module = triton_group_loss
    constants = {
        "MODE": mode,
        "KL": kl,
        "BLOCK": module.BLOCK,
        "COLUMNS": module.COLUMNS,
        **tiles(sizes),
    }
    return Variant(
        f"group_loss {name}", module.group_loss_kernel, module, latents(*dtypes), constants, sizes
    )


def backward(name, old_center, kl, *dtypes, sizes=ROW):
    module = triton_group_loss
    constants = {"OLD_CENTER": old_center, "KL": kl, "BLOCK": module.BLOCK}
    kernel = module.group_loss_backward_kernel
    return Variant(
        f"group_loss_backward {name}", kernel, module, latents(*dtypes), constants, sizes
    )


def variants():
    """The specializations that production uses: fp32 states with fp32 or bf16 velocities, and bf16
    for all."""
    mixed, fp32, bf16 = ("fp32", "bf16", "fp32"), ("fp32",) * 3, ("bf16",) * 3
    return [
        Variant(
            "normal",
            triton_noise.normal_kernel,
            triton_noise,
            {"key": "i64"},
            {"BLOCK": triton_noise.BLOCK},
        ),
        step("fp32", *fp32),
        step("fp32, velocity bf16", *mixed),
        step("bf16", *bf16),
        step("fp32, velocity bf16, 1 child", *mixed, sizes={**ROW, "children": 1}),
        step("fp32, 64 children", *fp32, sizes={**ROW, "children": 64}),
        forward("fp32", "plain_old", "none", *fp32),
        forward("fp32, first update, KL x", "plain", "x", *fp32),
        forward("velocity bf16, KL x", "plain_old", "x", *mixed),
        forward("bf16, KL v", "plain_old", "v", *bf16),
        forward("velocity bf16, guard, KL x", "guard_old", "x", *mixed),
        backward("fp32", False, False, *fp32),
        backward("velocity bf16, KL", False, True, *mixed),
        backward("bf16", False, False, *bf16),
        backward("velocity bf16, guard, KL", True, True, *mixed),
    ]


def launches():
    """The kernels as the launcher specializes them for sizes of real runs: FLUX at 1024 px with one
    row or several, and single elements."""
    mixed, flux, one = (
        ("fp32", "bf16", "fp32"),
        {"numel": 262144, "blocks": 128},
        {"numel": 1, "blocks": 1, "children": 1, "rows": 1},
    )

    def sized(make, *arguments, **sizes):
        return make(
            " ".join(f"{name}={size}" for name, size in sizes.items()), *arguments, sizes=sizes
        )

    def noise(name, sizes):
        return Variant(
            f"normal {name}",
            triton_noise.normal_kernel,
            triton_noise,
            {"key": "i64"},
            {"BLOCK": triton_noise.BLOCK},
            sizes,
        )

    return [
        sized(noise, **flux),
        sized(noise, **one),
        *(sized(step, *mixed, **flux, children=n) for n in (1, 6, 16)),
        sized(step, *mixed, **one),
        sized(forward, "plain", "x", *mixed, **flux, children=6, rows=1),
        sized(forward, "plain_old", "x", *mixed, **flux, children=16, rows=48),
        sized(forward, "plain", "x", *mixed, **one),
        sized(backward, False, True, *mixed, **flux, children=6),
        sized(backward, False, True, *mixed, **one),
    ]


def compile_for(variant, target):
    """The compiled kernel. Pointers are 16-byte aligned, as torch's are."""
    aligned = [
        i
        for i, (name, kind) in enumerate(variant.types.items())
        if kind.startswith("*") or kind == "i32" and variant.sizes.get(name, 1) % 16 == 0
    ]
    source = ASTSource(
        variant.kernel,
        signature=variant.types,
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": variant.module.NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def run_tool(tool, *arguments):
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    opcode: str
    operands: str


def disassemble(path):
    """Instructions and label addresses of a cubin with one kernel."""
    pattern = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\S+ )?\s*([A-Z][\w.]*)\s*(.*?);")
    instructions, labels, waiting = [], {}, []
    for line in run_tool("nvdisasm", "-c", "-ndf", path).splitlines():
        label = re.match(r"(\.L\w+):", line.strip())
        match = pattern.search(line)
        if label:
            waiting.append(label[1])
        elif match:
            # A branch on a uniform predicate names it as an operand: BRA.U UP0, `(.L_x_1)
            conditional = bool(match[2]) or bool(
                re.match(r"!?UP\d", match[4]) and match[3].startswith("BRA")
            )
            found = Instruction(int(match[1], 16), conditional, match[3], match[4])
            labels.update(dict.fromkeys(waiting, found.address))
            waiting = []
            instructions.append(found)
    return instructions, labels


def jump_target(instruction, labels):
    label = re.search(r"`\((\.L\w+)\)", instruction.operands)
    return labels[label[1]] if label and instruction.opcode.startswith("BRA") else None


def reached_without(instructions, labels, avoid):
    """Opcodes on the paths from entry that never run an instruction for which `avoid` holds."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    pending, seen = [0], set()
    while pending:
        i = pending.pop()
        if i in seen or i >= len(instructions) or avoid(instructions[i]):
            continue
        seen.add(i)
        target = jump_target(instructions[i], labels)
        if target is not None:
            pending.append(index[target])
        if instructions[i].conditional or not (
            target is not None or instructions[i].opcode == "EXIT"
        ):
            pending.append(i + 1)
    return {instructions[i].opcode for i in seen}


def makes_noise(instruction):
    return bool(PHILOX_MULTIPLIER.search(instruction.operands))


def noise_loop(instructions, labels):
    """The instructions of the loop that makes noise: the shortest loop among those that contain
    most of it. A straight-line kernel has no loop, and all of its instructions are returned; for a
    kernel with branches but without such a loop none are, because a count would mean nothing."""

    def body(start, end):
        return [i for i in instructions if start <= i.address <= end and i.opcode != "NOP"]

    jumps = [(jump_target(i, labels), i.address) for i in instructions]
    bodies = [body(start, end) for start, end in jumps if start is not None and start < end]
    bodies = [b for b in bodies if any(map(makes_noise, b))]
    if not bodies:
        return (
            []
            if {"EXIT", "STG.E.128"} <= reached_without(instructions, labels, makes_noise)
            else body(0, math.inf)
        )
    return max(bodies, key=lambda b: (sum(map(makes_noise, b)), -len(b)))


def access_width(opcode):
    return next(
        (bits for bits in (128, 64) if str(bits) in opcode.split(".")),
        16 if "U16" in opcode else 32,
    )


def expected_wide(ttgir, block, threads, operation):
    """The number of 16-byte accesses per thread that transfer the whole blocks of `operation`
    (tt.load or tt.store)."""
    total = 0
    for line in ttgir.splitlines():
        match = re.search(rf"{operation} .*tensor<{block}x!tt.ptr<(?:f|bf)(\d+)>", line)
        total += int(match[1]) // 8 * block // (threads * 16) if match else 0
    return total


def inspect_cuda(variant, compiled):
    """What the machine code of a compiled variant uses, as a dictionary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        instructions, labels = disassemble(file.name)
    loads = [i.opcode for i in instructions if i.opcode.startswith("LDG")]
    stores = [i.opcode for i in instructions if i.opcode.startswith("STG")]
    threads = 32 * variant.module.NUM_WARPS
    noisy = any(map(makes_noise, instructions))
    loop = noise_loop(instructions, labels) if noisy else []
    without_noise = reached_without(instructions, labels, makes_noise)
    shapes = {
        name: expected_wide(compiled.asm["ttgir"], variant.module.BLOCK, threads, f"tt.{name}")
        for name in ("load", "store")
    }
    return {
        **{
            name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1])
            for name in ("REG", "STACK", "LOCAL")
        },
        "shared": compiled.metadata.shared,
        "local_accesses": sum(i.opcode.startswith(("LDL", "STL")) for i in instructions),
        "wide_loads": sum(access_width(o) == 128 for o in loads),
        "wide_loads_expected": shapes["load"],
        "wide_stores": sum(access_width(o) == 128 for o in stores),
        "wide_stores_expected": shapes["store"],
        "narrow_loads": sum(access_width(o) < 128 and "STRONG" not in o for o in loads),
        "narrow_stores": sum(access_width(o) < 128 for o in stores),
        "instructions": len(instructions),
        "noise_instructions_per_element": len(loop) / variant.elements_per_thread if loop else None,
        "noise_multiplies_per_element": (
            sum("WIDE.U32" in i.opcode for i in loop) / variant.elements_per_thread
            if loop
            else None
        ),
        "ode_path_without_noise": {"EXIT", "STG.E.128"} <= without_noise if noisy else None,
    }


def report():
    """One dict per variant and target. A variant that does not compile for a target raises."""
    rows = []
    for variant in variants():
        rows += [cuda_row(variant, arch) for arch in CUDA_ARCHITECTURES]
        compiled = compile_for(variant, GPUTarget("hip", HIP_ARCHITECTURE, 64))
        rows.append({"kernel": variant.name, "target": HIP_ARCHITECTURE, **inspect_hip(compiled)})
    return rows


def cuda_row(variant, arch):
    return {
        "kernel": variant.name,
        "target": f"sm_{arch}",
        **inspect_cuda(variant, compile_for(variant, GPUTarget("cuda", arch, 32))),
    }


def launch_report():
    """The rows of the launcher's specializations, for one target."""
    return [cuda_row(variant, 90) for variant in launches()]


def inspect_hip(compiled):
    assembly = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    return {
        "reg": number("vgpr_count"),
        "local": number("private_segment_fixed_size"),
        "local_accesses": number("vgpr_spill_count"),
        "shared": number("group_segment_fixed_size"),
    }


def table(rows):
    """The report as a Markdown table."""
    columns = (
        "kernel",
        "target",
        "reg",
        "local",
        "local_accesses",
        "shared",
        "wide_loads",
        "wide_stores",
        "narrow_loads",
        "narrow_stores",
        "instructions",
        "noise_instructions_per_element",
    )
    lines = [
        "| " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        values = [row.get(c) for c in columns]
        cells = [
            "" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in values
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the report there")
    arguments = parser.parse_args()
    found = report()
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": found}, indent=1) + "\n"
        )
    print(f"triton {triton.__version__}, no GPU involved\n\n{table(found)}")
