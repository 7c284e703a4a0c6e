"""Commands of the stages, as experiments and the demo run them: in their folders, unless what they make is there already."""

import concurrent.futures
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """key: what the command is called. folder: the stage's. made: the file that has to exist afterwards. after: the files it
    waits for."""

    key: str
    folder: str
    command: tuple
    made: Path
    after: tuple = ()

    @property
    def is_done(self):
        return self.made.exists()

    @property
    def line(self):
        """What to type for it in the root folder."""
        return f"cd {self.folder} && python {' '.join(self.command)}"

    def start(self, root, **options):
        """The running process; options: as subprocess.Popen has them, and variables of the environment under `env`."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
        return subprocess.Popen([sys.executable, *self.command], cwd=root / self.folder, env=environment, **options)


class Runner:
    """Runs commands as soon as what they wait for is there, `jobs` at a time, one thread each; `logs` is the folder for what
    they say."""

    def __init__(self, jobs, root, logs):
        self.jobs, self.root, self.logs = jobs, root, logs
        self.lock = threading.Lock()
        self.running = set()

    def run(self, commands):
        """Run commands; return the keys of those that failed, or that wait for one that did."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting, failed = list(commands), []
        total, futures = len(waiting), {}
        print(f"{total} commands are left, {self.jobs} at a time", flush=True)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or futures:
                    ready = [command for command in waiting if all(path.exists() for path in command.after)]
                    for command in ready[:self.jobs - len(futures)]:
                        waiting.remove(command)
                        futures[pool.submit(self._execute, command)] = command
                    if not futures:
                        break  # what is left waits for something that failed
                    for future in concurrent.futures.wait(futures, return_when="FIRST_COMPLETED").done:
                        command = futures.pop(future)
                        seconds, status = future.result()
                        done = total - len(waiting) - len(futures)
                        ended = f"status {status}" if status else "done"
                        print(f"[{done}/{total}] {command.key}: {ended} in {seconds:.0f} s", flush=True)
                        if status:
                            failed.append(command.key)
            except KeyboardInterrupt:
                self._stop()
                raise SystemExit("stopped; the same command goes on from there") from None
        return failed + [command.key for command in waiting]

    def _execute(self, command):
        """Run one command in its folder; return (seconds, status)."""
        begun = time.time()
        with open(self.logs / f"{command.key.replace(' ', '_').replace('/', '_')}.log", "ab") as log:
            log.write(f"$ {command.line}\n".encode())
            log.flush()
            process = command.start(self.root, env={"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=subprocess.STDOUT)
            with self.lock:
                self.running.add(process)
            status = process.wait()
            with self.lock:
                self.running.discard(process)
        if not status and not command.is_done:
            status = f"0, but {command.made} is missing"
        return time.time() - begun, status

    def _stop(self):
        with self.lock:
            for process in self.running:
                process.terminate()
