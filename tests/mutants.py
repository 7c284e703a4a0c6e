"""Does a test notice a changed line? Random one-line changes of the method's files, each tried against the tests.

python tests/mutants.py [--count 120] [--seed 0] [--processes 2] [--only TEXT] [--again]

Rows of measurements/mutants.csv that are there are not tried again, so a run that was stopped goes on; delete rows to try them
anew. Where a change makes no difference, write `equivalent` into `outcome` and the reason into `by`. A change of a text, of an
annotation, of an error or of what is printed is none. A change is tried against those tests that reach its line, the quickest
first, in forks of a process that has imported torch already.
"""
# ruff: noqa: F401  what takes long to import is imported once, for all forks

import argparse
import ast
import copy
import csv
import itertools
import multiprocessing
import operator
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", WANDB_MODE="disabled")
import hypothesis
import matplotlib.pyplot
import pytest
import torch._dynamo
import torchvision

ROOT = Path(__file__).resolve().parents[1]
CSV, COLUMNS = ROOT / "measurements" / "mutants.csv", ["file", "line", "before", "after", "outcome", "by"]
# {file: names of its tests, the likely ones first}; they lie in the tests/ of the stage.
FIRST, SEARCH, LAST = "indicators_pretraining/", "quantization_search/", "quantization_training/"
TARGETS = {
    FIRST + "process.py": "training training_pass joint_training resume",
    FIRST + "engine/loop.py": "training resume pruning", FIRST + "engine/optim.py": "training optimizers joint_training",
    FIRST + "sparsity/ranking.py": "masks pruning graph", FIRST + "sparsity/masks.py": "masks pruning graph",
    FIRST + "model/layer_table.py": "graph arch attention layout names",
    FIRST + "indicators.py": "exchange names foreign joint_training sensitivity",
    SEARCH + "ilp.py": "ilp budgets search sparse", LAST + "quan/transfer.py": "finetuning limpq",
    LAST + "process.py": "finetuning evaluation resume pruning shipped",
    LAST + "packing.py": "packing export", LAST + "packed_network.py": "packing limpq export onnx",
    LAST + "packed_file.py": "packing export onnx"}
LIMIT = int(os.environ.get("LIMPQP_MUTANT_SECONDS", "300"))  # for the tests of one mutant
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
           ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
           ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)  # texts, and what is not the method
TALK = {"print", "log", "warn", "UserError"}
IS_COMMAND = "__name__ == '__main__'"


def changed(node):
    """The nodes that a node may become."""
    new = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPPED:
            new.ops = [SWAPPED[type(op)]()]
        case ast.BinOp() | ast.BoolOp() if type(node.op) in SWAPPED:
            new.op = SWAPPED[type(node.op)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            new = new.operand
        case ast.Constant(value=bool()):
            new.value = not node.value
        case ast.Constant(value=int() | float()):
            new.value = node.value + 1
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            new.func.id = NAMES[name]
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            new.func.attr = NAMES[name]
        case ast.Call(args=[_, _, *_]):
            new.args[:2] = new.args[1::-1]
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            new = ast.Pass()
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            new.value = ast.Constant(None)
        case _:
            return []
    return [new]


def name(function):
    return getattr(function, "id", getattr(function, "attr", ""))


def sites(node):
    """Every node that may be changed, below one."""
    call = node.value if isinstance(node, ast.Expr) else node
    if isinstance(node, SILENT) or TALK & {name(getattr(call, "func", None))} or ast.unparse(node) == IS_COMMAND or (
            isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("annotation", "returns", "decorator_list"):
                yield from sites(child)


def mutants_of(file):
    """[(file, line, before, after, changed source)] of every one-line change of a file, lines stripped."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines, found = source.splitlines(keepends=True), []
    for node in sites(ast.parse(source)):
        if getattr(node, "lineno", None) is None or node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1].encode()
        for new in changed(node):
            text = ast.unparse(new)
            text = f"({text})" if isinstance(new, ast.expr) and not isinstance(new, (ast.Constant, ast.Call)) else text
            after = (line[:node.col_offset] + text.encode() + line[node.end_col_offset:]).decode()
            found.append((file, node.lineno, line.decode().strip(), after.strip(),
                          "".join([*lines[:node.lineno - 1], after, *lines[node.lineno:]])))
    return found


def sample(count, seed, only):
    """Mutants of all files by turns, drawn by a seed; a larger count adds to those of a smaller one."""
    piles = [mutants_of(file) for file in TARGETS if only in file]
    for number, pile in enumerate(piles):
        random.Random(1000 * seed + number).shuffle(pile)
    turns = [pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile)]
    return turns[:count]


class Plugin:
    """Notes the first failure. With `lines`, {test: [seconds, the lines of a file that it reaches]}, it fills that in; with
    `chosen`, which is the same, it runs the tests that reach a line alone, the quickest first, or all where importing does."""

    def __init__(self, path, lines=None, chosen=None, line=None):
        self.path, self.lines, self.chosen, self.line = str(path), lines, chosen, line
        self.failed, self.now, self.began = "", [0.0, set()], time.time()

    def pytest_collection_modifyitems(self, items):
        if self.lines is not None:
            self.lines[""] = self.now
        if self.chosen is not None and self.line not in self.chosen[""][1]:
            items[:] = [item for item in items if self.line in self.chosen.get(item.nodeid, (0, ()))[1]]
            items.sort(key=lambda item: self.chosen[item.nodeid][0])

    def pytest_runtest_setup(self, item):
        if self.lines is not None:
            self.now, self.began = self.lines.setdefault(item.nodeid, [0.0, set()]), time.time()
            sys.settrace(self.trace)

    def pytest_runtest_teardown(self):
        self.now[0] = time.time() - self.began

    def pytest_runtest_logreport(self, report):
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def trace(self, frame, event, argument):
        """A trace function of Python: notes the lines of one file."""
        if frame.f_code.co_filename != self.path:
            return None
        self.now[1].add(frame.f_lineno)
        return self.trace


def run_tests(place, file, lines=None, line=None):
    """Run the tests of a file in a fork, those that reach `line`, if given: the name of the first that fails, 'time' where
    they take too long, '' where all pass. Without a line: (the same, what Plugin finds out of each test)."""
    stage, report = place / file.partition("/")[0], place / "report"
    report.write_bytes(pickle.dumps("died"))
    names = [f"tests/test_{name}.py" for name in TARGETS[file].split()]
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(stage)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        plugin = Plugin(place / file, *([None, lines, line] if line else [{}]))
        if not line:
            sys.settrace(plugin.trace)
        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names]
        status = pytest.main(words if line else words[1:], plugins=[plugin])
        failed = plugin.failed or ("" if status in (0, 5) else "collection")
        report.write_bytes(pickle.dumps(failed if line else (failed, plugin.lines)))
        os._exit(0)
    end = time.time() + (LIMIT if line else 10 * LIMIT)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time" if line else ("time", {})
        time.sleep(0.05)
    return pickle.loads(report.read_bytes())


def work(tasks):
    """Try mutants in a copy of the repository; add a row to the table for each."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place).resolve() / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"))
        for file, of_file in itertools.groupby(tasks, key=operator.itemgetter(0)):
            failed, lines = run_tests(place, file)
            if failed:
                sys.exit(f"{file}: {failed} fails without a change")
            original = (place / file).read_text(encoding="utf-8")
            for _, line, before, after, source in of_file:
                (place / file).write_text(source, encoding="utf-8")
                failed = run_tests(place, file, lines, line)
                row = dict(zip(COLUMNS, (file, line, before, after, "killed" if failed else "survived", failed), strict=True))
                with open(CSV, "a", newline="", encoding="utf-8") as table:
                    csv.DictWriter(table, COLUMNS).writerow(row)
                print(f"{row['outcome']:8} {file}:{line}: {before}  ->  {after}  {failed}", flush=True)
            (place / file).write_text(original, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 120), ("seed", 0), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="a part of the path of a file")
    parser.add_argument("--again", action="store_true", help="try those that survived again, as they are after new tests")
    options = parser.parse_args()
    if not CSV.exists():
        CSV.write_text(",".join(COLUMNS) + "\n")
    key = lambda row: (row[0], row[2], row[3])  # noqa: E731  not by the line, which moves
    there = {(row["file"], row["before"], row["after"]): row for row in csv.DictReader(CSV.open(encoding="utf-8"))}
    if options.again:
        tasks = [task for file in TARGETS for task in mutants_of(file)
                 if there.get(key(task), {}).get("outcome") == "survived"]
        with open(CSV, "w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in there.values() if row["outcome"] != "survived")
    else:
        tasks = [task for task in sample(options.count, options.seed, options.only) if key(task) not in there]
    files = sorted({task[0] for task in tasks})
    workers = [multiprocessing.Process(target=work, args=[sorted(
        (task for task in tasks if task[0] in files[number::options.processes]), key=operator.itemgetter(0))])
        for number in range(options.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows = [row for row in csv.DictReader(CSV.open(encoding="utf-8")) if row["outcome"] != "equivalent"]
    killed = sum(row["outcome"] == "killed" for row in rows)
    print(f"{killed} of {len(rows)} killed ({100 * killed / max(len(rows), 1):.1f} %), equivalent ones left aside")


if __name__ == "__main__":
    main()
