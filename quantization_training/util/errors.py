"""Errors a user can mend, and how a command reports them."""

import contextlib
import difflib
import os
import signal
import sys

USER_ERROR_STATUS = 2
SIGNAL_STATUS = 128  # plus the number of the signal, as shells count
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
                 "DefaultCPUAllocator: can't allocate memory", "Failed to allocate memory for requested buffer")
LOST_WORKER = "DataLoader worker"  # how torch begins to say that one is gone
SINGLE_VALUE = "Expected more than 1 value per channel"  # how torch begins to say it


class UserError(ValueError):
    """Something the user gave is wrong: a file, a key, a value. The message is one line that says what and where.

    is_told: whether another process of the run tells it already; None where all processes meet it alike.
    """

    is_told = None

    def __init__(self, message):
        printable = "".join(character if character.isprintable() else " " for character in str(message))
        super().__init__(" ".join(printable.split()))


class Interrupted(Exception):
    """A run was asked to stop by a signal, and left a checkpoint to go on from.

    Args:
        number: of the signal.
        place: where the run stands, in words, or ''.
    """

    def __init__(self, number, place=""):
        super().__init__(f"stopped by {signal.Signals(number).name}{place}")
        self.number = number


class Lost(Exception):
    """Another process of the run is gone, so that this one cannot go on. The message is empty where that one told why."""


def nearest(name, choices):
    """Return "; did you mean 'x'?" for the choice closest to `name`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def reason(error):
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def naming(key):
    """Let a UserError raised within begin with the key whose path it speaks of; '' leaves it as it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}" if key else error) from None


@contextlib.contextmanager
def advising(path, advice):
    """Let a UserError raised within, where no file is at `path`, end with advice on how to make it."""
    try:
        yield
    except UserError as error:
        raise error if os.path.lexists(path) else UserError(f"{error}; {advice}") from None


def _is_command_starting():
    """Whether the program that runs is a command beside util/, which turns Ctrl-C into a traceback as yet."""
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    return (os.path.dirname(os.path.abspath(program)) == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)


if _is_command_starting():  # commands import this module first: Ctrl-C ends them without a word while they import the others
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def user_errors_on_one_line():
    """Turn a UserError into one line on stderr and exit status 2, and a signal into one line and 128 plus its number."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except Interrupted as stop:
        _stop(f"{stop}; the same command goes on from there", SIGNAL_STATUS + stop.number)
    except Lost as error:
        _stop(str(error), 1, is_told=not str(error))
    except BrokenPipeError:  # what read our output is gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(SIGNAL_STATUS + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        _stop("; ".join(["stopped from the keyboard", *map(str, stop.args)]), SIGNAL_STATUS + signal.SIGINT)
    except Exception as error:
        mended = as_user_error(error)
        if mended is None:
            raise
        _stop(f"error: {mended}", USER_ERROR_STATUS, mended.is_told)


def as_user_error(error):
    """The UserError that an exception is or stands for, where a setting can mend it, or None."""
    if isinstance(error, UserError):
        return error
    if SINGLE_VALUE in str(error):
        return UserError("dataloader.batch_size: a BatchNorm met a single value per channel; take larger batches or larger "
                         "images (calibration_images counts too)")
    if isinstance(error, RuntimeError) and str(error).startswith(LOST_WORKER):
        return UserError(f"a process that reads images was lost ({reason(error)[:100]}); where memory is short, lower "
                         "dataloader.workers or dataloader.batch_size")
    if is_out_of_memory(error):
        return UserError(f"out of memory ({reason(error)[:80]}); lower dataloader.batch_size (accumulation in fine-tuning "
                         "keeps the step the same) or dataloader.input_size, or give precision: bf16")
    return None


def is_out_of_memory(error):
    """Whether an exception says that a device or the machine has no memory left: torch, which this module does without, and
    onnxruntime have many ways to."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(words in str(error) for words in OUT_OF_MEMORY))


def is_first_process():
    """Whether this process speaks for all of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _stop(line, status, is_told=None):
    """End the process with a line on stderr, unless another one tells it; None: the first process of each machine tells it."""
    if is_first_process() if is_told is None else not is_told:
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)
