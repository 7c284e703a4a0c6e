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
        raise KeyboardInterrupt("the same command goes on from the last checkpoint")
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


def ask():
    """Begin to ask all ranks for the number of a signal that came; what is returned gives it, 0 where none came."""
    return distributed.begin_largest_over_ranks(lambda: 0 if _put_off else noted())


def check(place="", asked=None):
    """Raise Interrupted, which says the place, on every rank where a signal came to any: until ask() was called, where what
    that gave is given, or until now. All ranks have to call it alike."""
    number = (asked or ask())()
    if number:
        raise Interrupted(number, place)


def watched(loader):
    """The batches of a loader, with a check before each, among ranks of what came before the last one; ranks may have unequal
    numbers of them."""
    batches, asked = iter(loader), ask()
    for _ in range(distributed.largest_over_ranks(len(loader))):
        check(asked=asked)
        asked = ask()
        batch = next(batches, None)
        if batch is not None:
            yield batch
