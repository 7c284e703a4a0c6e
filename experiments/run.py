"""Carry out experiments with the stages' own commands: python run.py EXPERIMENT.yaml ... [--quick] [--jobs N] [--report]

What is there already is not computed again, and a run that was killed goes on from its checkpoint, so the same command
continues where it stopped. Tables (CSV) and plots are written next to the experiment files; with --quick, a small version
of each is computed and written to results/quick.
"""

import os
import signal
import sys
from pathlib import Path

from plan import PlanError, read_experiment
from report import write_report
from steps import Runner
from util.command import Parser
from util.errors import UserError, user_errors_on_one_line

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__)
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
        raise UserError(error) from None
    if options.dry_run:
        for step in left_over(experiments):
            print(f"({step.line})", flush=True)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl-C, and so do the commands
    failed = [] if options.report else Runner(options.jobs, ROOT, results / "logs").run(left_over(experiments))
    for experiment in experiments:
        write_report(experiment, tables)
    if failed:
        sys.exit(f"error: {len(failed)} commands failed: {', '.join(failed)}; what they said lies in {results / 'logs'}; "
                 "the same command tries them again")


def find_data(typed):
    """The folder of Fashion-MNIST's files: the one typed, Debian's where it is, or one for torchvision to download into."""
    if typed:
        folder = Path(typed).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"--data: {typed} is no folder; leave it out to have the files downloaded")
        return folder
    return DEBIAN if DEBIAN.exists() else ROOT / "data"


def left_over(experiments):
    """The steps of all experiments that are not done, each once, in order."""
    steps = {}
    for experiment in experiments:
        for step in experiment.steps:
            steps.setdefault(step.made, step)
    return [step for step in steps.values() if not step.is_done]


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
