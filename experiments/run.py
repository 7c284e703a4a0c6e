"""Carry out experiments with the stages' own commands: python run.py EXPERIMENT.yaml ... [--quick] [--jobs N] [--report]

What is there already is not computed again, and a run that was killed goes on from its checkpoint, so the same command
continues where it stopped. Tables (CSV) and plots are written next to the experiment files; with --quick, a small version
of each is computed and written to results/quick.
"""

import argparse
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from plan import PlanError, read_experiment
from report import write_report
from util.errors import user_errors_on_one_line

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT.yaml", type=Path)
    parser.add_argument("--quick", action="store_true", help="the small version")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time, one thread each (all cores)")
    parser.add_argument("--report", action="store_true", help="run nothing; make tables and plots of what is there")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left, and run nothing")
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's files (Debian's, where they are installed)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: found {options.jobs}, expected at least 1")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    results = HERE / "results" / "quick" if options.quick else HERE / "results"
    tables = results if options.quick else HERE
    seen = [f"../{folder.relative_to(ROOT)}" for folder in (results, tables)]  # from the folder of a stage
    data = find_data(options.data)
    try:
        experiments = [read_experiment(path, ROOT, *seen, data, options.quick) for path in options.experiments]
    except PlanError as error:
        sys.exit(f"error: {error}")
    if options.dry_run:
        for step in left_over(experiments):
            print(f"({step.line})", flush=True)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl-C, and so do the commands
    failed = [] if options.report else Runner(options.jobs, results).run(experiments)
    for experiment in experiments:
        write_report(experiment, tables)
    if failed:
        sys.exit(f"error: {len(failed)} commands failed: {', '.join(failed)}; what they said lies in {results / 'logs'}; "
                 "the same command tries them again")


def find_data(typed):
    """The folder of Fashion-MNIST's files: the one typed, Debian's where it is, or one for torchvision to download into."""
    if typed:
        return Path(typed).expanduser().resolve()
    return DEBIAN if DEBIAN.exists() else ROOT / "data"


def left_over(experiments):
    """The steps of all experiments that are not done, each once, in order."""
    steps = {}
    for experiment in experiments:
        for step in experiment.steps:
            steps.setdefault(step.made, step)
    return [step for step in steps.values() if not step.is_done]


class Runner:
    """Runs steps as soon as what they wait for is there, `jobs` at a time; logs lie in `folder`/logs."""

    def __init__(self, jobs, folder):
        self.jobs, self.logs = jobs, folder / "logs"
        self.lock = threading.Lock()
        self.running = set()

    def run(self, experiments):
        """Run everything that is left; return the keys of the steps that failed, or that wait for one that did."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting, failed = left_over(experiments), []
        total, futures = len(waiting), {}
        print(f"{total} commands are left, {self.jobs} at a time", flush=True)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or futures:
                    ready = [step for step in waiting if all(path.exists() for path in step.after)]
                    for step in ready[:self.jobs - len(futures)]:
                        waiting.remove(step)
                        futures[pool.submit(self._execute, step)] = step
                    if not futures:
                        break  # what is left waits for something that failed
                    for future in concurrent.futures.wait(futures, return_when="FIRST_COMPLETED").done:
                        step = futures.pop(future)
                        seconds, status = future.result()
                        done = total - len(waiting) - len(futures)
                        ended = f"status {status}" if status else "done"
                        print(f"[{done}/{total}] {step.key}: {ended} in {seconds:.0f} s", flush=True)
                        if status:
                            failed.append(step.key)
            except KeyboardInterrupt:
                self._stop()
                raise SystemExit("stopped; the same command goes on from there") from None
        return failed + [step.key for step in waiting]

    def _execute(self, step):
        """Run one command in its folder; return (seconds, status)."""
        begun = time.time()
        with open(self.logs / f"{step.key.replace(' ', '_').replace('/', '_')}.log", "ab") as log:
            log.write(f"$ {step.line}\n".encode())
            log.flush()
            process = step.start(ROOT, env={"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=log,
                                 stderr=subprocess.STDOUT)
            with self.lock:
                self.running.add(process)
            status = process.wait()
            with self.lock:
                self.running.discard(process)
        if not status and not step.is_done:
            status = f"0, but {step.made} is missing"
        return time.time() - begun, status

    def _stop(self):
        with self.lock:
            for process in self.running:
                process.terminate()


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
