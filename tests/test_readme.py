"""The README and docs/ say what commands exist, what they print and what was measured: every command is run by a test that is
named here, or called untested; searches are run here; links, tables and figures are compared with files of the repository."""

import functools
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import forked
import pytest

import demo
from measurements import pages

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["indicators_pretraining", "quantization_search", "quantization_training"]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMAND = re.compile(r"(python3?|torchrun|pip|make|bash|sh|\./\S+) ")

# Each command of the pages, but those that a test reads there and runs, and the test that runs it, on smaller data.
TESTED = {
    "tests/test_pipeline.py::test_the_way_of_the_readme": [
        "python main.py config_mobilenet_digits.yaml",
        "python sensitivity.py config_mobilenet_digits.yaml --of fisher --output results/mobilenet_digits/fisher.pkl",
        "python search.py --i ../indicators_pretraining/results/mobilenet_digits/fisher.pkl "
        "--b 6 5 4 3 2 --wb 3 --ab 3 --cr 0 --bops True --output results/policy_mobilenet_digits_w3a3.yaml",
        "python main.py finetune_mobilenet_digits_w3a3.yaml",
        "python main.py eval_mobilenet_digits_w3a3.yaml",
        "python export.py results/mobilenet_digits_w3a3/mobilenet_digits_w3a3_checkpoint.pth.tar "
        "--output results/mobilenet_digits_w3a3.safetensors"],
    "tests/test_pipeline.py::test_the_packed_model_repeats_the_figures_of_its_checkpoint": [
        "python export.py results/mobilenet_digits_w3a3/mobilenet_digits_w3a3_checkpoint.pth.tar "
        "--output results/model.safetensors",
        "python main.py eval_mobilenet_digits_w3a3.yaml resume.path=results/model.safetensors"],
    "tests/test_pipeline.py::test_a_pruned_network_walks_all_stages": ["python pruning.py prune_resnet20_digits.yaml"],
    "tests/test_pipeline.py::test_two_processes_walk_stages_one_and_three": [
        "python -m torch.distributed.launch --nproc_per_node=2 main.py CONFIG.yaml",
        "torchrun --nproc_per_node=2 main.py CONFIG.yaml"],
    "quantization_training/tests/test_export.py::check_inspection": ["python export.py --inspect results/model.safetensors"],
    "quantization_training/tests/test_benchmark.py::test_a_line_for_each_way_and_batch": [
        "python export.py --benchmark results/model.safetensors --batch 1 16"],
    "quantization_training/tests/test_benchmark.py::"
    "test_a_latency_table_has_every_layer_at_every_pair_and_adds_up_to_the_network": [
        "python export.py --benchmark results/model.safetensors --latency-table results/times.csv"],
    "quantization_training/tests/test_export.py::check_predictions": [
        "python export.py --predict results/model.safetensors IMAGE.png"],
    "quantization_training/tests/test_onnx.py::test_a_trained_network_gives_the_same_classes_and_each_layer_the_same_values": [
        "python export.py results/model.safetensors --onnx results/model.onnx"],
    "quantization_training/tests/test_onnx_integer.py::test_a_trained_network_in_integers_gives_the_same_classes": [
        "python export.py results/model.safetensors --onnx results/integer.onnx --profile integer"],
    "quantization_training/tests/test_qonnx.py::"
    "test_the_package_qonnx_gives_the_outputs_of_pytorch_on_digits_and_the_bitops_of_the_search": [
        "python export.py results/model.safetensors --qonnx results/quant_nodes.onnx"],
    "indicators_pretraining/tests/test_sensitivity.py::test_the_file_is_as_the_extractor_writes_it": [
        "python sensitivity.py config_mobilenet_digits.yaml --output results/sensitivity.pkl --images 1000"],
    "indicators_pretraining/tests/test_joint_sensitivity.py::test_the_file_is_as_the_extractor_writes_it": [
        "python sensitivity.py config_mobilenet_digits.yaml --of fisher --output results/fisher.pkl",
        "python sensitivity.py config_mobilenet_digits.yaml --of kl --output results/kl.pkl"],
    "indicators_pretraining/tests/test_taylor.py::test_the_checkpoint_has_sums_of_the_last_epoch_which_the_extractor_reads": [
        "python importance_extractor.py results/mobilenet_digits/mobilenet_digits_checkpoint.pth.tar --of joint_fisher "
        "--output results/joint_fisher.pkl"],
    "indicators_pretraining/tests/test_refine.py::test_a_refined_policy_has_less_divergence_within_the_budgets": [
        "python refine.py config_mobilenet_digits.yaml "
        "--policy ../quantization_search/results/policy_mobilenet_digits_w3a3.yaml "
        "--i results/joint_fisher.pkl --output results/policy_refined.yaml"],
    "indicators_pretraining/tests/test_refine.py::test_policies_are_ranked_with_their_costs": [
        "python refine.py config_mobilenet_digits.yaml "
        "--policy ../quantization_search/results/policy_mobilenet_digits_w3a3.yaml results/policy_refined.yaml"],
}


def lines_of(block):
    """The lines of a block, joined where they are continued, without comments, one for each command."""
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    return [part for line in joined.splitlines() for part in re.sub(r"\s+# .*", "", line).strip().split(" && ") if part]


def blocks(text):
    """[(the paragraph before it, what is inside)] of the blocks between lines of ```"""
    found, paragraph = [], ""
    for index, part in enumerate(re.split(r"^```.*\n", text, flags=re.MULTILINE)):
        if index % 2:
            found.append((paragraph, part))
        else:
            paragraph = part.strip().rpartition("\n\n")[2] or paragraph
    return found


def commands(text):
    """[(command, its folder or '', whether the paragraph before it says untested, the policy that the page says it prints)]"""
    found = []
    for (paragraph, block), (_, following) in pairwise([*blocks(text), ("", "")]):
        lines, folder, printed = lines_of(block), "", following if following.startswith("searched") else ""
        if any(COMMAND.match(line) for line in lines):
            for line in lines:
                if line.startswith("cd "):
                    folder = line.rpartition("/")[2].removeprefix("cd ")
                elif not line.startswith(("export ", "source ")):
                    found.append((line, folder, "untested" in paragraph, printed))
    return found


def section(page, heading):
    return TEXTS[page].partition(f"\n{heading}\n")[2].partition("\n## ")[0]


ALL = [(page, *found) for page, text in TEXTS.items() for found in commands(text)]
OWN_COMMANDS = [command for command, *_ in commands(section("docs/networks_and_data.md", "## A network of your own"))]
SET_UP = section("README.md", "## Set-up")
SEARCHES = {(command, printed) for _, command, _, _, printed in ALL if "search.py" in command and "--i indicators/" in command}


def test_every_command_is_run_by_a_test_or_called_untested():
    tested = {*OWN_COMMANDS, *(command for command, *_ in commands(SET_UP)), *(command for command, _ in SEARCHES),
              *(command for listed in TESTED.values() for command in listed)}
    unknown = [(page, command) for page, command, _, is_untested, _ in ALL
               if command not in tested and not is_untested and not command.startswith("pip ")]
    assert unknown == [], "name the test in TESTED, or write untested into the paragraph before the command"
    assert tested <= {command for _, command, *_ in ALL}, "TESTED names a command that no page has"
    assert len(OWN_COMMANDS) == 6 and sum(bool(printed) for _, printed in SEARCHES) == 4


def test_commands_are_found_wherever_they_stand_and_a_paragraph_says_untested_for_its_own_blocks_only():
    text = ("An untested one:\n\n```\ncd a && python x.py \\\n    --y  # z\n```\n\n```yaml\na: b\n```\n\n"
            "Another.\n```\n$ ls\nmake all\n```\n")
    assert commands(text) == [("python x.py --y", "a", True, ""), ("$ ls", "", False, ""), ("make all", "", False, "")]


@pytest.mark.parametrize("test", TESTED)
def test_the_test_that_is_named_is_there_and_runs_the_script_with_these_flags(test):
    name, _, function = test.partition("::")
    source = (ROOT / name).read_text(encoding="utf-8")
    assert f"def {function}(" in source
    for command in TESTED[test]:
        words = re.findall(r"(?<= )--\w[\w-]*|\w+(?=\.py)|^torchrun", command)
        assert words and [word for word in words if word not in source] == [], command


def test_files_flags_and_targets_of_commands_exist():
    """In those that are untested, too."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", "".join(TEXTS.values()))) <= set(targets)
    for page, command, folder, *_ in ALL:
        words, stages = command.split(), [folder] if folder else [*STAGES, "."]
        for word in words:
            if re.fullmatch(r"\w+\.yaml|[\w/]+\.py|requirements\S*", word) and word != "CONFIG.yaml":
                assert any((ROOT / stage / word).exists() for stage in stages) or (ROOT / word).exists(), (page, command)
        after = command.partition(".py")[2] if words[0] == "python" else ""
        sources = "".join(path.read_text(encoding="utf-8") for stage in stages for path in (ROOT / stage).glob("*.py"))
        for flag in re.findall(r" (--\w[\w-]*)", after):
            assert f'"{flag}"' in sources or (folder == "quantization_search" and flag in search_flags()), (page, command)


@functools.cache
def search_flags():
    """The flags of the search, whose help begins a line with each."""
    said = subprocess.run([sys.executable, "search.py", "--help"], cwd=ROOT / "quantization_search", capture_output=True,
                          text=True, check=True).stdout
    return set(re.findall(r"^  (--[\w-]+)", said, re.MULTILINE))


@pytest.mark.parametrize(("command", "printed"), sorted(SEARCHES))
def test_a_search_runs_and_prints_the_policy_that_the_page_shows(command, printed, tmp_path):
    stage = ROOT / "quantization_search"
    (tmp_path / "indicators").symlink_to(stage / "indicators")
    done = subprocess.run([sys.executable, stage / "search.py", *shlex.split(command)[2:]], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not printed or done.stdout.splitlines()[-2:] == printed.strip().splitlines()


def test_the_set_up_makes_an_environment_and_enters_it(tmp_path):
    """Without what takes minutes: pip is one that says what it is asked for."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "pip.py").write_text("import sys\nprint('pip', *sys.argv[1:])")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase $2 in venv) set -- "$@" --without-pip; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    [(_, block)] = blocks(SET_UP)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "VENV"))}
    done = subprocess.run(["bash", "-ec", block + "command -v python"], cwd=tmp_path, capture_output=True, text=True,
                          check=False, env=kept | {"PYTHON": str(python), "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^pip install .*-r requirements.txt -r requirements-dev.txt$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == str(tmp_path / ".venv/bin/python")


def test_the_page_on_the_search_has_every_flag():
    flags = search_flags()
    assert "--sweep" in flags and flags == set(re.findall(r"--\w[\w-]*", section("docs/search.md", "## Flags")))


def test_the_demo_runs_the_commands_of_the_readme():
    shown = {command for command, *_ in commands(TEXTS["README.md"])}
    before, tunings, after = demo.steps()
    for step in (*before, tunings[0], *after):
        command = "python " + " ".join(step.command).partition(" --plot")[0]
        assert command in shown, command


def test_every_file_that_the_pages_name_is_there():
    for page, text in TEXTS.items():
        for name in re.findall(r"(?:main\.py |`)(\w+\.yaml)", text):
            if not name.startswith(("CONFIG", "args", "summary", "policy")):
                assert list(ROOT.glob(f"*/{name}")), (page, name)


def anchors(text):
    """What links to the headings of a page end with."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*TEXTS, "quantization_search/indicators/README.md", "experiments/README.md"])
def test_links_point_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if "://" not in target:
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_readme_is_short_and_lists_every_page():
    assert TEXTS["README.md"].count("\n") <= 220
    assert {page for page in TEXTS if page != "README.md"} <= set(re.findall(r"\((docs/\w+\.md)\)", TEXTS["README.md"]))


def test_the_own_network_of_the_readme_is_that_of_the_page_that_a_test_reads():
    shown = [command for command, *_ in commands(section("README.md", "## Your own network"))]
    assert shown == OWN_COMMANDS[:len(shown)] and "search.py" in shown[-1]


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
    assert differing == sum(pattern.groups or 1 for pattern, *_ in parts) >= 20
    assert pages.filled(changed) == texts


def test_no_measured_figure_stands_in_the_pages_that_no_command_wrote(texts):
    """What a search prints is compared above, which networks work in test_networks.py."""
    for path, text in texts.items():
        for pattern, *_ in pages.parts():
            text = pattern.sub("", text)
        text = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
        if path.name not in ("networks.md", "configuration.md"):  # both generated
            assert re.findall(r"[\d.,]+ ?(?:± \d|% top-1|(?:s|ms|seconds|minutes|hours|KB|MB|GB)\b)", text) == [], path.name


def test_words_without_a_place_are_an_error(texts):
    with pytest.raises(ValueError, match=re.escape("'The commands took {} seconds' stands 0 times")):
        pages.filled({path: text.replace("The commands took", "They took") for path, text in texts.items()})


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


def test_the_page_of_all_keys_and_the_json_schemas_are_what_the_schemas_say(tmp_path):
    made = forked.run(ROOT, "measurements/configuration.py", str(tmp_path))
    assert made.returncode == 0, made.stderr
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / file).read_text(encoding="utf-8") == (ROOT / "docs" / file).read_text(encoding="utf-8"), file


@pytest.mark.parametrize(("stage", "script", "key"), [
    ("indicators_pretraining", "main.py", "random_pass"), ("indicators_pretraining", "pruning.py", "prune.amount"),
    ("quantization_training", "main.py", "policy")])
def test_help_config_says_every_key_without_a_configuration(stage, script, key):
    said = forked.run(ROOT / stage, script, "--help-config")
    assert said.returncode == 0 and re.search(rf"^{re.escape(key)}: .* \(default: ", said.stdout, re.MULTILINE)
    assert "quan.excepts.LAYER.weight.bit: a whole number at least 2 and at most 8 (default: blank)\n    " in said.stdout
