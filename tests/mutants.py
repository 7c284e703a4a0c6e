"""Does a test notice a changed line? Random one-line changes of the method's files, each tried against the tests.

python tests/mutants.py [--count 100] [--seed 0] [--processes 2] [--only TEXT]

Rows of measurements/mutants.csv that are there are not tried again, so a run that was stopped goes on; delete rows to try them
anew. Where a change makes no difference, write `equivalent` into `outcome` and the reason into `by`. A change of a text, of an
annotation, of an error or of what is printed is none. Tests run in forks of a process that has imported torch already.
"""

import argparse
import ast
import copy
import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  imported here, once for all forks
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
CSV, COLUMNS = ROOT / "measurements" / "mutants.csv", ["file", "line", "before", "after", "outcome", "by"]
# {file: names of its tests, the likely ones first}; they lie in the tests/ of the stage.
FIRST, SEARCH, LAST = "indicators_pretraining/", "quantization_search/", "quantization_training/"
TARGETS = {
    FIRST + "process.py": "training training_pass joint_training resume",
    FIRST + "util/training.py": "training resume pruning",
    FIRST + "util/optim.py": "training optimizers joint_training", FIRST + "model/masks.py": "masks pruning graph",
    FIRST + "model/layer_table.py": "graph arch attention layout names", LAST + "quan/transfer.py": "finetuning limpq",
    FIRST + "importance_extractor.py": "exchange joint_training sensitivity", SEARCH + "ilp.py": "ilp budgets search sparse",
    LAST + "process.py": "finetuning resume pruning", LAST + "packing.py": "packing export",
    LAST + "packed_network.py": "packing export onnx", LAST + "packed_file.py": "packing export onnx"}
LIMIT = int(os.environ.get("LIMPQP_MUTANT_SECONDS", "600"))  # for the tests of one mutant
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
        case ast.Return(value=ast.expr()):
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


def run_tests(place, file, names):
    """The name of the first failing test of a stage in `place`, 'time' where they take too long, '' where all pass."""
    stage, report = place / file.partition("/")[0], place / "failed"
    report.write_text("died")
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(stage)
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", WANDB_MODE="disabled")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)

        class Note:
            failed = ""

            def pytest_runtest_logreport(self, report):
                self.failed = self.failed or (report.nodeid if report.failed else "")
        note = Note()
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names], plugins=[note])
        report.write_text(note.failed or ("" if status == 0 else "collection"))
        os._exit(0)
    end = time.time() + LIMIT
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time"
        time.sleep(0.1)
    return report.read_text()


def work(tasks):
    """Try mutants in a copy of the repository; add a row to the table for each."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place) / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"))
        for file, line, before, after, source in tasks:
            original = (place / file).read_text(encoding="utf-8")
            (place / file).write_text(source, encoding="utf-8")
            failed = run_tests(place, file, [f"tests/test_{name}.py" for name in TARGETS[file].split()])
            (place / file).write_text(original, encoding="utf-8")
            row = dict(zip(COLUMNS, (file, line, before, after, "killed" if failed else "survived", failed), strict=True))
            with open(CSV, "a", newline="", encoding="utf-8") as table:
                csv.DictWriter(table, COLUMNS).writerow(row)
            print(f"{row['outcome']:8} {file}:{line}: {before}  ->  {after}  {failed}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 120), ("seed", 0), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="a part of the path of a file")
    options = parser.parse_args()
    if not CSV.exists():
        CSV.write_text(",".join(COLUMNS) + "\n")
    key = lambda row: (row[0], row[2], row[3])  # noqa: E731  not by the line, which moves
    there = {(row["file"], row["before"], row["after"]) for row in csv.DictReader(CSV.open(encoding="utf-8"))}
    tasks = [task for task in sample(options.count, options.seed, options.only) if key(task) not in there]
    workers = [multiprocessing.Process(target=work, args=[tasks[number::options.processes]])
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
