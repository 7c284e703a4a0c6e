"""Errors a user can mend, and how a command reports them."""

import contextlib
import difflib
import os
import sys

USER_ERROR_STATUS = 2


class UserError(ValueError):
    """Something the user gave is wrong: a file, a key, a value. The message is one line that says what and where."""


def nearest(name, choices):
    """Return "; did you mean 'x'?" for the choice closest to `name`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def reason(error):
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def user_errors_on_one_line():
    """Turn a UserError into one line on stderr and exit status 2.

    Every process of a multi-process run meets the same error; one process per machine prints it.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
