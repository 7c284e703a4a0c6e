"""Runs a command of a stage again and again, killing it at random moments, until it ends by itself.

python killer.py STAGE_FOLDER SCRIPT KILLS SEED RUN_FOLDER WORD...

Each attempt is a fork of this process, so that imports are paid once. It is killed after a few changes of files in RUN_FOLDER
and a part of the time between two of them, so that a slow machine makes no difference; every third kills itself with a part of
a checkpoint written, which no process beside it could be sure to meet. The kills stop after KILLS of them.
Prints as JSON how many attempts were killed, and how many of these while a checkpoint was being written.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback

MOST_CHANGES = 6  # of files, until a kill
MOST_WRITES = 3  # of checkpoints, until a kill inside one
LIMIT = 60  # seconds that one attempt may take in all


def die_in_write(writes, part):
    """From now on, kill this process once the last of some checkpoints is partly on the disk, before it gets its name."""
    replace, left = os.replace, [writes]

    def replace_or_die(source, target):
        left[0] -= str(source).endswith(".tar.partial")
        if left[0] == 0:
            os.truncate(source, int(part * os.path.getsize(source)))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def attempt(module, words, death=None):
    """Start the command in a child, where the arguments of `die_in_write` may say when it dies; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        if death:
            die_in_write(*death)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        module.main(words)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child):
    """The exit status of a child, or None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def is_writing(folder, since):
    """Whether a checkpoint was begun after a time and is not whole yet."""
    return any(name.endswith(".tar.partial") and changed > since for name, changed in stamp(folder))


def kill_when_due(child, folder, draw):
    """Kill a child after a random time; return its status if it ends before, else None."""
    begun, before, moment = time.time_ns(), stamp(folder), None
    changed, left = None, draw.randint(1, MOST_CHANGES)  # at least one: nothing is proven by killing what has not begun
    while time.time_ns() < begun + 10**9 * LIMIT:
        status = ended(child)
        if status is not None:
            return status
        now, files = time.time_ns(), stamp(folder)
        if files != before:
            before, left = files, left - 1
            if left == 0:
                moment = now + draw.random() * (now - (changed or now))
            changed = now
        if moment is not None and now > moment:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)
    raise TimeoutError(f"an attempt neither ended nor wrote anything in {LIMIT} s")


def stamp(folder):
    """Changes with every file that is written into a folder, its lock left aside."""
    try:
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder) if entry.name != ".lock")
    except FileNotFoundError:
        return []


def main(stage, script, kills, seed, folder, *words):
    os.chdir(stage)
    sys.path.insert(0, stage)
    module = importlib.import_module(script)
    draw, killed, writing = random.Random(int(seed)), 0, 0
    while killed < int(kills):
        begun = time.time_ns()
        if killed % 3 == 2:
            child = attempt(module, list(words), (draw.randint(1, MOST_WRITES), draw.random()))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            status = kill_when_due(attempt(module, list(words)), folder, draw)
        if status not in (None, -signal.SIGKILL):
            break
        killed += 1
        writing += is_writing(folder, begun)  # what a killed writer leaves behind
    else:
        status = os.waitstatus_to_exitcode(os.waitpid(attempt(module, list(words)), 0)[1])
    print(json.dumps({"killed": killed, "writing": writing, "status": status}))


if __name__ == "__main__":
    main(*sys.argv[1:])
