"""The benchmarks are scripts beside each other, not a package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in ("tests/engine", "tests/kernels", "recipes"):
    sys.path.insert(0, str(ROOT / folder))
# last: its kernels.py must not pass for Hugging Face's package
sys.path.append(str(ROOT / "benchmarks"))
