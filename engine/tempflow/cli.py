"""What all commands share: exit statuses, signals, and quiet libraries.

A UserError ends with its message and status 2, any other exception with a traceback and status 1.
"""

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
    """Keep advice of the libraries off the terminal, and set defaults for them.

    Call it before they are imported: they read these environment variables once. Errors are still
    shown, and variables that the user has set stay.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _ensure_home()
    _choose_caches()
    # Let torch's allocator grow its segments instead of adding new ones: decoding takes 6 GB
    # between small forwards, and a nearly full GPU cannot afford the fragmentation of such a mix.
    # torch reads the variable when CUDA is first used. Private pools of CUDA graphs support such
    # segments too (alloc_block in c10/cuda/CUDACachingAllocator.cpp). torch prefers the older name,
    # so that is the user's choice as well.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    prefer_cpu()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "transformers", "diffusers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _ensure_home() -> None:
    """Set HOME if there is no absolute one, as for a container's user without a name.

    Libraries would create a folder named ~ in the working directory.
    """
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = str(_temporary_home())


def _temporary_home() -> Path:
    home = Path(tempfile.gettempdir(), f"tempflow-home-{os.getuid()}")
    # A fixed name, so that compiled code is found again. In a shared temporary folder somebody else
    # may have made it: code that they can write must not be run.
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        trusted = home.stat().st_uid == os.getuid() and not home.is_symlink()
    except OSError:
        trusted = False
    return home if trusted else Path(tempfile.mkdtemp(prefix="tempflow-home-"))


def _choose_caches() -> None:
    """Keep compiled code in the home folder, where it outlives a reboot.

    If the home folder cannot be written (a container's /), use the temporary folder. torch's
    compiler reads these variables when it is imported.
    """
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
    """Exit with status 2 if a launcher's variables are not numbers.

    It must run first: all other code, error messages included, reads these variables as numbers.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            print(
                f"error: environment variable {name}: expected a whole number, as launchers set it,"
                f" got {shown(value)}",
                file=sys.stderr,
            )
            sys.exit(2)


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main and exit.

    The status is 2 for a UserError, whose message is printed, 1 for any other exception, with its
    traceback, and otherwise what main returns. Output that cannot be written (a closed pipe) does
    not end the command.
    """
    steady()
    unwind_on_signals()
    _check_launch()
    try:
        status = main() or 0
    except UserError as error:
        # Ranks usually raise the same error together: the first of each machine prints it.
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except Exception:
        # Printed here and not by the interpreter, because `end_process` below skips its shutdown.
        sys.excepthook(*sys.exc_info())
        status = 1
    if in_process_group():
        end_process(status)
    sys.exit(status)


@contextmanager
def collector_off() -> Iterator[None]:
    """Turn Python's garbage collector off, for work that is short and needs little memory.

    While libraries are imported, the collector walks all their objects again and again, which takes
    a tenth of a dry run's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unwind_on_signals() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, by an exception.

    So unfinished output folders are removed when a scheduler ends the job or the terminal closes.
    Training replaces these handlers by its own. Signals that the parent process set to be ignored
    (nohup) stay ignored.
    """
    for kind in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is signal.SIG_DFL:
            signal.signal(kind, lambda number, frame: sys.exit(128 + number))


def in_process_group() -> bool:
    """Whether torch.distributed is initialized."""
    # Through sys.modules, because an import would load torch in commands that do without it.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end_process(status: int) -> None:
    """Exit a rank without shutting the interpreter down; exit handlers are run.

    gloo's threads live as long as anything (DeepSpeed) holds a process group. One that releases a
    Python object during the shutdown aborts the process, which happened in 4 of 25 runs of two
    ranks.
    """
    # Only after success. A rank that fails alone would wait here for NCCL calls that the others
    # never make.
    if status == 0:
        sys.modules["torch.distributed"].destroy_process_group()
    from tempflow.compat import run_exit_handlers

    run_exit_handlers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
