"""What the scripts share: how errors end, and which noise of the libraries is kept from the
terminal."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

from tempflow.errors import RankError, UserError, shown
from tempflow.run.environment import prefer_cpu
from tempflow.run.streams import steady


def quiet_libraries() -> None:
    """Keep the libraries' advice out of the progress display, and set their defaults; their errors
    stay. Before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _ensure_home()
    _choose_caches()
    # torch's allocator grows its segments instead of adding new ones: decoding takes 6 GB between
    # small forwards, and on a full card what such a mix fragments is missing. It reads this when
    # CUDA is first used; both names are the user's to set. CUDA graphs' private pools may consist
    # of such segments too (alloc_block in c10/cuda/CUDACachingAllocator.cpp).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # which goes before the other
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    prefer_cpu()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _ensure_home() -> None:
    """Without a home folder (a container's user without a name) libraries make one named ~ where
    the command is run; with a relative one, one there."""
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = str(_temporary_home())


def _temporary_home() -> Path:
    home = Path(tempfile.gettempdir(), f"tempflow-home-{os.getuid()}")
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        trusted = home.stat().st_uid == os.getuid() and not home.is_symlink()
    except OSError:
        trusted = False
    return home if trusted else Path(tempfile.mkdtemp(prefix="tempflow-home-"))


def _choose_caches() -> None:
    """Where compiled code is kept: in the home folder, which outlives the machine's temporary
    folder; there, where the home cannot be written (a container's /). To be set before torch's
    compiler reads it."""
    inductor = Path(os.path.expanduser("~"), ".cache/tempflow/inductor")
    try:
        inductor.mkdir(parents=True, exist_ok=True)
        writable = os.access(inductor, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    home = None if writable else _temporary_home()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "inductor" if home else inductor))
    if home:
        os.environ.setdefault("TRITON_HOME", str(home))
        os.environ.setdefault("TRITON_CACHE_DIR", str(home / ".triton/cache"))
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(home / "torch_extensions"))


def _check_launch() -> None:
    """Exit with status 2 where a launcher's variables are no numbers; read before anything else
    asks which rank this is."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            print(
                f"error: the environment has {name}={shown(value)}; expected a whole number, as"
                " launchers set it",
                file=sys.stderr,
            )
            sys.exit(2)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 2 with the bare message for a user's error, 1 with the
    traceback for any other, main's own status otherwise. Output that cannot be written does not end
    it."""
    steady()
    unwind_on_signals()
    _check_launch()
    try:
        status = main() or 0
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    if in_process_group():
        end_process(status)
    sys.exit(status)


@contextmanager
def collector_off() -> Iterator[None]:
    """Without Python's garbage collector, which takes a tenth of a start: it walks what the
    libraries make while they are imported again and again. For what ends soon and holds little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unwind_on_signals() -> None:
    """A scheduler's SIGTERM and the SIGHUP of a closed terminal end a script as Ctrl-C does: drafts
    are taken away. Training takes them over; what a parent has this process ignore (nohup) stays
    ignored."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is signal.SIG_DFL:
            signal.signal(kind, lambda number, frame: sys.exit(128 + number))


def in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end_process(status: int) -> None:
    """Exit a rank without taking its interpreter down: gloo's threads live on while anything
    (DeepSpeed) holds a group, and one that lets go of a Python object meanwhile aborts the process
    (4 of 25 ends of two ranks). Exit handlers are run."""
    # a rank that fails alone would wait in here for NCCL calls that the others never make
    if status == 0:
        sys.modules["torch.distributed"].destroy_process_group()
    from tempflow.compat import run_exit_handlers

    run_exit_handlers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
