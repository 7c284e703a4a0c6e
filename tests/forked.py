"""`python SCRIPT WORD...` in forks of a process that has imported already what takes seconds, such as torch.

What a command reads, writes, prints and ends with is as from a shell: of the repository it finds the folder of the script
alone, and no module of a stage is there before it. torchrun() is torchrun, its agent and its signals, with ranks that are
forks of it.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = multiprocessing.get_context("forkserver")  # which computes nothing: forks of one with threads of OpenMP hang
PRELOADED = ["torch._dynamo", "torch.distributed.run", "torchvision.models", "matplotlib.figure",
             "matplotlib.backends.backend_agg"]
PROCESSES.set_forkserver_preload(PRELOADED)


class Fork:
    """A command that was started. What it prints goes to files; it is asked and ended as a subprocess.Popen.

    Args:
        folder: its working directory.
        words: the script, relative to the folder, and its arguments.
        is_leader: it leads a process group of its own.
        is_merged: its stderr goes where its stdout goes.
    """

    def __init__(self, folder, *words, is_leader=False, is_merged=False):
        self.words, self.place = [str(word) for word in words], tempfile.TemporaryDirectory()
        self.process = PROCESSES.Process(target=_become, args=(
            str(folder), self.words, dict(os.environ), self.place.name, is_leader, is_merged,
            multiprocessing.get_start_method()))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        """(stdout, stderr), once it has ended; one that does not is killed."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.words, timeout, *map(str.encode, self._said()))
        return self._said()

    def _said(self):
        return tuple((Path(self.place.name) / name).read_text(errors="replace") for name in ("stdout", "stderr"))


def _become(folder, words, environment, place, is_leader, is_merged, start_method):
    """The child: turn into the command, whose own children are started as they are from a shell."""
    multiprocessing.set_start_method(start_method, force=True)
    if is_leader:
        os.setsid()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if is_merged:
        os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _run_script(*words)


def _run_script(script, *words):
    """As `python SCRIPT WORD...` in this process."""
    sys.argv = [script, *words]
    path = os.path.abspath(script)
    sys.path[:] = [os.path.dirname(path), *(folder for folder in sys.path if folder and not Path(folder).is_relative_to(ROOT))]
    runpy.run_path(path, run_name="__main__")


def run(folder, *words, limit=300):
    """Run a command to its end: as subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)."""
    command = Fork(folder, *words)
    stdout, stderr = command.communicate(limit)
    return subprocess.CompletedProcess(command.words, command.returncode, stdout, stderr)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(folder, *words, **options):
    """Start torchrun for two ranks, which are forks too; WORDS are its other options, the script and its arguments."""
    return Fork(folder, __file__, "--nproc_per_node=2", f"--master_port={free_port()}", *words, **options)


def two_agents(folder, *words, **options):
    """Start torchrun twice, for one rank each, as on two machines. Returns both, and what starts the second again."""
    meeting = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    first, second = (partial(torchrun, folder, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", meeting,
                             f"--rdzv_conf=is_host={is_host}", *words, **options) for is_host in (True, False))
    return first(), second(), second


def _fork_ranks(config, entrypoint):
    """For torchrun's elastic_launch, which starts `python -u SCRIPT WORD...`."""
    return elastic_launch(replace(config, start_method="fork"), lambda unbuffered, *words: _run_script(*words))


if __name__ == "__main__":
    from torch.distributed import run as module

    elastic_launch, module.elastic_launch = module.elastic_launch, _fork_ranks
    module.main(sys.argv[1:])
