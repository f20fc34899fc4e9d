"""Standard output and standard error whose failure does not end the command.

A closed pipe (`| head`), a full disk or a terminal that is gone would otherwise end hours of
training with an exception from a print.
"""

from __future__ import annotations

import errno
import os
import sys

from tempflow.errors import UserError

# With these errors the other end is gone for good; a full disk, for one, may have room again.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class Steady:
    """A text stream whose writes never raise. The first failure is reported on standard error,
    unless that is the stream itself.

    Attributes:
        lost: whether a write has failed.
    """

    def __init__(self, stream, name: str):
        self._stream, self._name, self.lost = stream, name, False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a terminal in the C locale, and a prompt in Chinese
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lose(error)
        return len(text)  # as a stream: rich and logging expect the count

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    # isatty, fileno, encoding and the rest: rich asks the stream about its terminal.
    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        # The descriptor now leads to /dev/null. Python flushes its buffer at exit, and would print
        # an exception and exit with status 120 if that failed again.
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
    """Check that standard output took all of a command's result.

    Raises:
        UserError: where a write failed; the command then must not exit with status 0.
    """
    if isinstance(sys.stdout, Steady) and sys.stdout.lost:
        raise UserError("the result could not be written to standard output")


def steady() -> None:
    """Make this process's standard streams steady."""
    # A closed descriptor is opened to /dev/null. The next file that the process opens would get
    # its number otherwise, and every print would be written into that file.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    sys.stdout = Steady(sys.stdout or open(1, "w", closefd=False), "standard output")
    sys.stderr = Steady(sys.stderr or open(2, "w", closefd=False), "standard error")
