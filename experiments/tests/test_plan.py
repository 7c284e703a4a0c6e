"""Experiment files: how they become commands, and what is refused."""

from pathlib import Path

import pytest
import yaml

from plan import PlanError, read_experiment

HERE = Path(__file__).resolve().parent.parent
ROOT = HERE.parent
EXPERIMENTS = sorted(HERE.glob("*.yaml"))

PLAN = {
    "title": "A title", "question": "Which?",
    "settings": {"lr": 0.1, "run": "train.py lr={lr}"},
    "values": {"seed": [0, 1], "budget": {"small": {"bits": 2}, "large": {"bits": 4, "file": "{results}/b_{seed}.pkl"}}},
    "steps": {
        "tune": {"over": ["seed", "budget"], "where": {"budget": ["large"]}, "folder": "stage",
                 "command": "{run} name=t{budget.bits}_{seed} from={results}/joint_{seed}/x.tar i={budget.file}",
                 "makes": "{results}/t_{budget}_{seed}"},
        "joint": {"over": ["seed"], "folder": "stage", "command": "{run} name=joint_{seed}",
                  "makes": "{results}/joint_{seed}"},
    },
    "quick": {"settings": {"lr": 1}, "values": {"seed": [5]}},
    "report": {"main": {"kind": "accuracy", "runs": {"tune": None}, "group": ["budget"]}},
}


def written(folder, plan, name="plan.yaml"):
    (folder / name).write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / name


def read(folder, plan, **options):
    return read_experiment(written(folder, plan), folder, "../out", "../tables", "/data", **options)


def test_a_step_becomes_a_command_for_each_combination(tmp_path):
    tune = read(tmp_path, PLAN).named("tune")
    assert [step.command for step in tune] == [
        ("train.py", "lr=0.1", f"name=t4_{seed}", f"from=../out/joint_{seed}/x.tar", f"i=../out/b_{seed}.pkl")
        for seed in (0, 1)]
    assert tune[0].values == {"seed": "0", "budget": "large"}
    assert tune[0].made == tmp_path / "out" / "t_large_0" / "summary.yaml"


def test_a_step_waits_for_what_its_command_names_of_the_same_seed(tmp_path):
    experiment = read(tmp_path, PLAN)
    for tune, joint in zip(experiment.named("tune"), experiment.named("joint"), strict=True):
        assert tune.after == (joint.made,)
        assert joint.after == ()


def test_names_that_only_begin_alike_are_not_waited_for(tmp_path):
    plan = PLAN | {"values": PLAN["values"] | {"seed": [1, 11]}}
    experiment = read(tmp_path, plan)
    one, eleven = experiment.named("joint")
    assert [step.after for step in experiment.named("tune")] == [(one.made,), (eleven.made,)]


def test_words_are_taken_as_they_are_written(tmp_path):
    words = ["1.10", "010", "1:30", "1e-3", "on", "0x10", "2024-01-01"]
    (tmp_path / "plan.yaml").write_bytes(b"\xef\xbb\xbf" + f"""
settings: {{lr: {words[0]}}}
values: {{word: [{', '.join(words)}], budget: {{{words[1]}: {{bits: {words[2]}}}}}}}
steps: {{go: {{over: [word, budget], folder: stage, command: "go {{word}} {{lr}} {{budget}} {{budget.bits}}",
             makes: "run_{{word}}"}}}}
""".encode())
    steps = read_experiment(tmp_path / "plan.yaml", tmp_path, "../out", "../tables", "/data").named("go")
    assert [step.command for step in steps] == [("go", word, "1.10", "010", "1:30") for word in words]


@pytest.mark.parametrize("data", ["title: é".encode("latin-1"), "title: é".encode("utf-16"), b"a: [1"])
def test_a_file_that_is_no_yaml_is_named(tmp_path, data):
    (tmp_path / "plan.yaml").write_bytes(data)
    with pytest.raises(PlanError, match="plan.yaml: cannot be read"):
        read_experiment(tmp_path / "plan.yaml", tmp_path, "../out", "../tables", "/data")


def test_quick_takes_its_own_settings_and_values(tmp_path):
    experiment = read(tmp_path, PLAN, quick=True)
    assert [step.command for step in experiment.named("joint")] == [("train.py", "lr=1", "name=joint_5")]


def test_an_included_file_comes_first(tmp_path):
    written(tmp_path, PLAN, "other.yaml")
    own = {"title": "Mine", "include": ["other.yaml"], "settings": {"lr": 3}, "values": {"seed": [7]}}
    experiment = read(tmp_path, own)
    assert experiment.title == "Mine" and experiment.report == PLAN["report"]
    assert [step.command for step in experiment.named("joint")] == [("train.py", "lr=3", "name=joint_7")]


def changed(step, **keys):
    return PLAN | {"steps": PLAN["steps"] | {step: PLAN["steps"][step] | keys}}


@pytest.mark.parametrize(("plan", "words"), [
    (PLAN | {"stepz": {}}, "stepz"),
    (changed("tune", over=["seed", "size"]), "size is none of the values"),
    (changed("tune", command="{nothing}"), "{nothing} is no setting"),
    (changed("tune", command="{budget.cr}"), "{cr} is no setting"),
    (changed("tune", comand="x"), "expected folder, command and makes"),
    (changed("tune", makes="{results}/joint_{seed}"), "both make"),
    (PLAN | {"values": {"seed": {"one": {"name": "x"}}}}, "seed.one: name is taken"),
    (PLAN | {"values": {"seed": {"one": {"flags": "--at-least depthwise=4", "2": None}}}}, "seed.one: 2 has no value"),
    (changed("joint", command="go {results}/t_large_{seed}/x"), "wait for each other"),
])
def test_a_mistake_is_named(tmp_path, plan, words):
    with pytest.raises(PlanError, match="plan.yaml") as error:
        read(tmp_path, plan)
    assert words in str(error.value)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_the_experiments_that_lie_here_name_commands_and_files_that_exist(path, quick):
    experiment = read_experiment(path, ROOT, "../experiments/results", "../experiments", "/data", quick)
    made = {step.made for step in experiment.steps}
    assert experiment.report
    assert all(any(experiment.named(name) for name in entry["runs"]) for entry in experiment.report.values())
    for step in experiment.steps:
        assert (ROOT / step.folder / step.command[0]).is_file(), step.command
        for word in step.command[1:]:
            value = word.rpartition("=")[2]
            if value.endswith(".yaml") and not value.startswith("../experiments/results"):
                assert (ROOT / step.folder / value).is_file(), word
            if value.startswith("../experiments/results/") and step.command[step.command.index(word) - 1] != "--output":
                target = (ROOT / step.folder / value).resolve()
                assert target in made or any(target.is_relative_to(other.parent) and other.name == "summary.yaml"
                                             for other in made), word
    names = {step.name for step in read_experiment(path, ROOT, "results", "experiments", "/data").steps}
    for entry in experiment.report.values():
        assert set(entry["runs"]) <= names
