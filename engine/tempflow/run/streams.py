"""Standard output and standard error that may break without ending the command: a closed pipe, a
full disk, a lost terminal."""

from __future__ import annotations

import errno
import os
import sys

from tempflow.errors import UserError

# what was at the other end will not come back
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class Steady:
    """A text stream whose writes never raise. The first one that fails is told of on stderr, if
    this is another stream.

    lost: whether one has failed.
    """

    def __init__(self, stream, name: str):
        self._stream, self._name, self.lost = stream, name, False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lose(error)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        # whatever is still in a buffer goes nowhere, also when Python ends
        if getattr(error, "errno", None) in GONE:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        told, self.lost = self.lost, True
        if not told and sys.stderr is not self:
            reason = getattr(error, "strerror", None) or error
            print(
                f"warning: {self._name} cannot be written ({reason}); the command goes on"
                " without it",
                file=sys.stderr,
                flush=True,
            )


def check_result() -> None:
    """UserError where standard output, whose content is a command's result, did not take all of
    it."""
    if isinstance(sys.stdout, Steady) and sys.stdout.lost:
        raise UserError("the result could not be written to standard output")


def steady() -> None:
    """Make this process's standard streams steady. A descriptor that is closed is opened to
    nowhere, or some file would get it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    sys.stdout = Steady(sys.stdout or open(1, "w", closefd=False), "standard output")
    sys.stderr = Steady(sys.stderr or open(2, "w", closefd=False), "standard error")
