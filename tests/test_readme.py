"""The README and docs/ say what commands print and what was measured: searches are run here on the files of the repository,
tables and figures are compared with the CSV files that the measuring commands wrote."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from measurements import pages

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


@pytest.fixture(scope="module")
def texts():
    return {path: path.read_text(encoding="utf-8") for path in pages.PAGES}


def test_tables_and_figures_are_those_that_the_measuring_commands_wrote(texts):
    assert pages.filled(texts) == texts, "python -m measurements.pages puts them there"


def test_a_digit_that_changes_anywhere_in_them_is_noticed(texts):
    changed, parts = dict(texts), pages.parts()
    for pattern, *_ in parts:
        [(path, match)] = pages.found_in(changed, pattern)
        for start, end in [match.span(number) for number in range(1, 1 + pattern.groups)] or [match.span()]:
            place = start + re.search(r"\d(?=\D*$)", changed[path][start:end]).start()
            other = str((int(changed[path][place]) + 1) % 10)
            changed[path] = changed[path][:place] + other + changed[path][place + 1:]
    differing = sum(one != other for path in texts for one, other in zip(texts[path], changed[path], strict=True))
    assert differing == sum(pattern.groups or 1 for pattern, *_ in parts) > 100
    assert pages.filled(changed) == texts


def test_no_measured_figure_stands_in_the_pages_that_no_command_wrote(texts):
    """What a search prints is compared above, which networks work in test_networks.py."""
    for path, text in texts.items():
        for pattern, *_ in pages.parts():
            text = pattern.sub("", text)
        text = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
        if path.name != "networks.md":
            assert re.findall(r"[\d.,]+ ?(?:± \d|% top-1|(?:s|ms|seconds|minutes|hours|KB|MB|GB)\b)", text) == [], path.name


def test_words_without_a_place_are_an_error(texts):
    with pytest.raises(ValueError, match=re.escape("'`make demo` took {} seconds' stands 0 times")):
        pages.filled({path: text.replace("`make demo` took", "it took") for path, text in texts.items()})


def test_the_demo_records_its_table_and_its_time_where_all_of_it_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    figures, packed = tmp_path / "measurements" / "figures.csv", tmp_path / demo.TRAINING / demo.PACKED
    for path, text in ((figures, "name,value,unit,command\ndemo,9,s,x\nother,2,s,y\n"), (packed, "12345")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for seconds, written in ((None, "demo,9,s,x"), (7.2, "demo,7,s,python demo.py --record")):
        demo.record([{"network": "dense", "top1": 1.5}], False, seconds)
        assert figures.read_text().splitlines() == ["name,value,unit,command", written, "other,2,s,y",
                                                    "demo packed,5,bytes,python demo.py --record"]
    assert (tmp_path / "measurements" / "demo.csv").read_text() == "network,top1\ndense,1.5\n"
