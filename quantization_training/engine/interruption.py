"""Ctrl-C and SIGTERM: a run finishes its step, writes a checkpoint and leaves, on all ranks alike."""

import contextlib
import signal
import threading

from util import distributed
from util.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_noted = []  # numbers of the signals that came
_put_off = []  # not empty while they have to wait


@contextlib.contextmanager
def signals_noted():
    """While this lasts, SIGINT and SIGTERM are noted for check(). A second Ctrl-C ends a run of one process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _noted.clear()


def _note(number, frame):
    # A launcher sends on the Ctrl-C that its workers have got from the terminal already.
    if number == signal.SIGINT and signal.SIGINT in _noted and not distributed.is_distributed():
        raise KeyboardInterrupt
    _noted.append(number)


def noted():
    """The number of the signal that came first to this process, 0 where none came."""
    return _noted[0] if _noted else 0


@contextlib.contextmanager
def put_off():
    """While this lasts, check() lets signals wait, so that what a later start would begin anew comes to its end."""
    _put_off.append(True)
    try:
        yield
    finally:
        _put_off.pop()


def check(place=""):
    """Raise Interrupted, which says the place, on every rank where a signal came to any. All ranks have to call it alike."""
    number = 0 if _put_off else distributed.largest_over_ranks(noted())
    if number:
        raise Interrupted(number, place)


def watched(loader):
    """The batches of a loader, with a check before each; ranks may have unequal numbers of them."""
    batches = iter(loader)
    for _ in range(distributed.largest_over_ranks(len(loader))):
        check()
        batch = next(batches, None)
        if batch is not None:
            yield batch
