"""One run at a time in a run folder: two that wrote there at once would leave the result of neither."""

import contextlib
import errno
import os
import socket
import time

from util import distributed
from util.errors import UserError
from util.exchange import no_empty_folders

try:
    import fcntl
except ImportError:  # not every platform has such locks
    fcntl = None

NAME = ".lock"
PATIENCE = 2.0  # seconds that a process which was killed may take to be gone


@contextlib.contextmanager
def alone_in(folder, reads_only=False):
    """Within, no other run is at work in a run folder. Rank 0 sees to that for all ranks; all have to enter.

    The lock belongs to the process alone: it goes with it, whatever ends it, and a process that it forks has no part in it.
    Where it cannot be had, as on a disk that is not writable, or not on this platform, nothing is locked.

    Args:
        folder: made where it is missing, and removed again where nothing was written into it.
        reads_only: whether nothing is going to be written; others are then not in the way.

    Raises:
        UserError: where another process is at work there.
    """
    with contextlib.ExitStack() as stack:
        if not reads_only and fcntl is not None:
            distributed.on_main(stack.enter_context, _locked(folder))
        yield


@contextlib.contextmanager
def _locked(folder):
    path = os.path.join(folder, NAME)
    with no_empty_folders(folder):
        descriptor = _lock(folder, path)
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):  # while it is locked still, so that nobody's is removed but our own
                    os.remove(path)
                os.close(descriptor)


def _lock(folder, path):
    """Lock the file at `path`; return its open descriptor, or None where it cannot be locked."""
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            os.makedirs(folder, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                with contextlib.suppress(OSError):  # a disk that is full can hold a lock, if not who has it
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except FileNotFoundError:  # removed by the one that had locked it
            pass
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                return None
            if time.monotonic() > limit:
                holder = os.read(descriptor, 300).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise UserError(f"{folder}: another run is at work in this folder ({holder}); wait until it ends, stop it, or "
                                "take another name") from None
            time.sleep(0.05)
        os.close(descriptor)
