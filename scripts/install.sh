#!/usr/bin/env bash
# install.sh VENV CONSTRAINTS: a virtual environment with this project, its test tools and the pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 constraints=$2

"${PYTHON:-python3}" - <<'CHECK'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"Python 3.10 to 3.12 is needed, this is {sys.version.split()[0]}; choose one with make PYTHON=python3.11")
CHECK
echo "Installing into $venv (about 3 GB). This takes some minutes, and pip prints nothing meanwhile."
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
# DeepSpeed's build imports torch, so torch and setuptools come first and its build is not isolated.
torch=$(grep '^torch==' "$constraints")
$pip install -q setuptools wheel
if [ "$constraints" = constraints.txt ] && [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    # The default Linux build brings gigabytes of CUDA: take the CPU build, from the index in use or from PyTorch's own.
    $pip install -q "$torch+cpu" 2>/dev/null || $pip install -q --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch+cpu" || {
        echo "No CPU build of $torch was found. Name an index that has one: make install TORCH_INDEX=URL" >&2
        exit 1
    }
else
    $pip install -q -c "$constraints" "$torch"
fi
# Its build asks every op whether it could be compiled, even where none is; on a machine with a GPU's driver and without nvcc the
# answer of some is an exception, unless they are told not to look.
DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 $pip install -q -c "$constraints" --no-build-isolation deepspeed
extras=dev
[ "$constraints" = constraints.txt ] || extras=dev,gpu
$pip install -q -c "$constraints" -e ".[$extras]"
"$venv/bin/python" - <<'DONE'
import torch
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
print(f"installed: torch {torch.__version__}, {device}")
DONE
