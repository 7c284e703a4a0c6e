"""Errors a user can mend, and how a command reports them."""

import contextlib
import difflib
import os
import sys

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count
PIPE_STATUS = 141  # 128 + SIGPIPE
SINGLE_VALUE = "Expected more than 1 value per channel"  # how torch begins to say it


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
    """Turn a UserError into one line on stderr and exit status 2, and Ctrl-C into one line and 130.

    Every process of a multi-process run meets the same error; one process per machine prints it.
    """
    try:
        yield
    except UserError as error:
        _stop(f"error: {' '.join(str(error).split())}", USER_ERROR_STATUS)
    except ValueError as error:
        if SINGLE_VALUE not in str(error):
            raise
        _stop("error: dataloader.batch_size: a BatchNorm met a single value per channel; take larger batches or larger "
              "images (calibration_images counts too)", USER_ERROR_STATUS)
    except BrokenPipeError:  # what read our output is gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_STATUS)
    except KeyboardInterrupt:
        _stop("stopped from the keyboard; the same command goes on from the last checkpoint", INTERRUPTED_STATUS)


def _stop(line, status):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)
