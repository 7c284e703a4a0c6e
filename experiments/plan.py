"""An experiment file as a list of steps: the commands of the stages for every combination of values, in order.

An experiment file holds

  title, question   what it is about
  include           files whose `settings`, `values` and `steps` come first, and whose `report` counts where there is none here
  settings          single words that commands take as {name}
  values            {axis: list, or {name: {field: word}}}; commands take {axis} and {axis.field}
  steps             {step: {over: axes, where: {axis: values}, folder, command, makes}}
  quick             settings and values that take the place of these in a small run
  report            what is made of the results; see report.py

`makes` is the file, or the run folder, that the command leaves; a step waits for the steps whose `makes` its command names.
Paths in commands count from the folder that they run in. {results}, {tables} and {data} are given by the runner.
"""

import itertools
import re
import shlex
import string
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from steps import Command

RUN = "summary.yaml"  # what a finished run folder holds
FILES = (".pkl", ".yaml", ".png")
SECTIONS = {"title", "question", "include", "settings", "values", "steps", "quick", "report"}
STEP_KEYS = {"over", "where", "folder", "command", "makes"}


class PlanError(ValueError):
    """An experiment file that cannot be carried out: which file, which key, what was expected."""


@dataclass(frozen=True)
class Value:
    """One value of an axis: printed as its name, with its fields as attributes."""

    name: str
    fields: dict

    def __format__(self, specification):
        return format(self.name, specification)

    def __getattr__(self, name):
        if name.startswith("__") or name not in self.fields:
            raise AttributeError(name)
        return self.fields[name]


@dataclass(frozen=True, kw_only=True)
class Step(Command):
    """A command for one combination of values. key: step name and values."""

    name: str
    values: dict
    makes: str

    def read(self, flag):
        """The file that the command takes by this flag, where it is."""
        return self.made.parent / Path(self.command[self.command.index(flag) + 1]).name


@dataclass(frozen=True)
class Experiment:
    """name, title, question, values {axis: [Value]}, steps in an order that can be carried out, report."""

    name: str
    title: str
    question: str
    values: dict
    steps: list
    report: dict

    def named(self, name):
        """The steps of this name, in order."""
        return [step for step in self.steps if step.name == name]


def read_experiment(path, root, results, tables, data, quick=False):
    """Read an experiment file.

    Args:
        path: of the YAML file.
        root: the folder that holds the stages.
        results, tables, data: what {results}, {tables} and {data} stand for, as seen from a stage's folder: where runs, where
            tables and plots, and where Fashion-MNIST's files lie.
        quick: whether the section `quick` counts.

    Raises:
        PlanError: naming file and key.
    """
    sections = _read(Path(path))
    if quick:
        sections = _over(sections, sections["quick"])
    axes = {axis: _values(f"{path}: values.{axis}", rows) for axis, rows in sections["values"].items()}
    words = {**sections["settings"], "results": results, "tables": tables, "data": data}
    steps = []
    for name, row in sections["steps"].items():
        steps += _expand(path, name, row, axes, words, Path(root))
    steps = [_linked(step, steps) for step in steps]
    _check_order(path, steps)
    return Experiment(Path(path).stem, sections["title"], sections["question"], axes, steps, sections["report"])


class _Words(yaml.SafeLoader):
    """Reads words of commands as they stand there: 1.10 and 010 are no numbers, and `on` is no truth value."""

    yaml_implicit_resolvers = {}


_Words.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|)$"), None)
_Words.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), None)


def _read(path):
    """The sections of a file, after those that it includes."""
    try:
        own = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Words)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        why = (f"line {mark.line + 1}: {error.problem}" if mark else getattr(error, "strerror", None) or "no UTF-8 text")
        raise PlanError(f"{path}: cannot be read ({why})") from None
    if not isinstance(own, dict) or set(own) - SECTIONS:
        odd = ", ".join(sorted(set(own) - SECTIONS)) if isinstance(own, dict) else type(own).__name__
        raise PlanError(f"{path}: found {odd}; allowed are {', '.join(sorted(SECTIONS))}")
    whole = {"title": path.stem, "question": "", "settings": {}, "values": {}, "steps": {}, "quick": {}, "report": {}}
    for other in own.pop("include", []):
        included = _read(path.parent / other)
        whole = _over(whole, {section: included[section] for section in ("settings", "values", "steps", "quick", "report")})
    return _over(whole, own)


def _over(sections, others):
    """The sections with what stands in the others over it, entry by entry; in `quick`, kind by kind."""
    merged = {**sections, **others}
    for section in {"settings", "values", "steps"} & set(others):
        merged[section] = sections[section] | (others[section] or {})
    if "quick" in others:
        merged["quick"] = {kind: sections["quick"].get(kind, {}) | (others["quick"].get(kind) or {})
                           for kind in ("settings", "values")}
    return merged


def _values(where, rows):
    if isinstance(rows, dict):
        for name, row in rows.items():
            if taken := {"name", "fields"} & set(row or {}):
                raise PlanError(f"{where}.{name}: {taken.pop()} is taken; give the field another name")
            if empty := [key for key, word in (row or {}).items() if word is None]:
                raise PlanError(f"{where}.{name}: {empty[0]} has no value; put a value with a comma into quotes")
        return [Value(str(name), {key: str(word) for key, word in (row or {}).items()}) for name, row in rows.items()]
    return [Value(str(name), {}) for name in rows]


def _expand(path, name, row, axes, words, root):
    """The steps of one entry, one for each combination of the values of its axes."""
    where = f"{path}: steps.{name}"
    if not isinstance(row, dict) or set(row) - STEP_KEYS or not {"folder", "command", "makes"} <= set(row):
        raise PlanError(f"{where}: expected folder, command and makes, and perhaps over and where")
    unknown = [axis for axis in [*row.get("over", []), *row.get("where", {})] if axis not in axes]
    if unknown:
        raise PlanError(f"{where}: {unknown[0]} is none of the values {', '.join(axes)}")
    over = row.get("over", [])
    wanted = {axis: set(map(str, names)) for axis, names in row.get("where", {}).items()}
    for combination in itertools.product(*(axes[axis] for axis in over)):
        values = dict(zip(over, combination, strict=True))
        if any(values[axis].name not in names for axis, names in wanted.items()):
            continue
        try:
            command, makes = (_filled(row[key], {**words, **values}) for key in ("command", "makes"))
        except (KeyError, AttributeError) as error:
            raise PlanError(f"{where}: {{{error.args[0]}}} is no setting and none of its values") from None
        made = (root / row["folder"] / makes).resolve()
        key = " ".join([name, *(value.name for value in values.values())])
        yield Step(key, row["folder"], tuple(shlex.split(command)), made if makes.endswith(FILES) else made / RUN,
                   name=name, values={axis: value.name for axis, value in values.items()}, makes=makes)


def _filled(text, words):
    """The text with its {words}; words may hold {words} themselves."""
    for _ in range(5):
        if "{" not in text:
            break
        text = string.Formatter().vformat(text, (), words)
    return " ".join(text.split())


def _linked(step, steps):
    """The step, waiting for what other steps make and its command names."""
    words = re.split(r"[\s=]", " ".join(step.command))
    after = tuple(other.made for other in steps if other is not step
                  and any(word == other.makes or word.startswith(f"{other.makes}/") for word in words))
    return replace(step, after=after)


def _check_order(path, steps):
    """Refuse two steps that make the same, and steps that wait for each other."""
    makers = {}
    for step in steps:
        if step.made in makers:
            raise PlanError(f"{path}: {makers[step.made]} and {step.key} both make {step.makes}")
        makers[step.made] = step.key
    done = set()
    while len(done) < len(steps):
        ready = [step.made for step in steps if step.made not in done and set(step.after) <= done]
        if not ready:
            left = ", ".join(step.key for step in steps if step.made not in done)
            raise PlanError(f"{path}: steps wait for each other: {left}")
        done.update(ready)
