"""The README's search commands, run on the files of the repository, print what it says they print."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import demo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^python (search\.py .*?indicators/.*?)^```$.*?^```$(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_there_is_an_example():
    assert EXAMPLE.search(README)


@pytest.mark.parametrize(("command", "printed"), EXAMPLE.findall(README))
def test_the_policy_in_the_readme_is_the_one_its_command_prints(command, printed, tmp_path):
    words = shlex.split(command.replace("\\\n", " "))
    words[words.index("--output") + 1] = str(tmp_path / "policy.yaml")
    done = subprocess.run([sys.executable, *words], cwd=ROOT / "quantization_search", capture_output=True, text=True,
                          check=True)
    assert done.stdout.splitlines()[-2:] == printed.strip().splitlines()


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"(?:main\.py |`)(\w+\.yaml)", README):
        if not name.startswith(("CONFIG", "args", "summary", "policy")):
            assert list(ROOT.glob(f"*/{name}")), name


def one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("row", list(csv.DictReader((ROOT / "measurements" / "readme.csv").read_text().splitlines())),
                         ids=lambda row: row["what"][:40])
def test_what_was_measured_stands_in_the_readme_as_it_was_measured(row):
    assert one_line(row["in_readme"]) in one_line(README) and row["command"]


def test_the_table_of_the_demo_is_that_of_what_it_recorded():
    rows = list(csv.DictReader((ROOT / "measurements" / "demo.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 3 and demo.table(rows) in README


@pytest.mark.parametrize("page", sorted((ROOT / "experiments").glob("*.md")), ids=lambda page: page.stem)
def test_tables_that_the_readme_takes_from_an_experiment_are_those_of_its_page(page):
    """A table right after a paragraph that links to the page of an experiment."""
    shown = re.findall(rf"\]\(experiments/{page.stem}\.md\).*\n(?:.+\n)*\n((?:\|.*\n)+)", README)
    for table in shown:
        assert table.strip() in page.read_text(encoding="utf-8")


def test_the_readme_shows_the_main_table():
    assert re.search(r"\]\(experiments/policies\.md\).*\n(?:.+\n)*\n\| policy \|", README)
