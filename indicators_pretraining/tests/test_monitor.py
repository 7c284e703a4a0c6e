"""Watching a run: log, metrics.csv, scoreboard, progress bar, curves, and wandb in all its moods."""

import io
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.metrics_file import SPLITS, MetricsFile, best_epochs
from engine.monitor import Monitor, open_monitor
from engine.plots import colour_labels, draw_panel, save_curves
from engine.run_folder import RunFolder
from engine.schema import LogConfig, RunConfig, WandbConfig
from engine.training_state import ResumeState
from util.config import load_config
from util.errors import UserError

STAGE = Path(__file__).resolve().parents[1]
HEADER = "epoch,split,bits,loss,top1,top5,lr,seconds"
QUIET = WandbConfig(mode="disabled")


@pytest.fixture(autouse=True)
def _private_wandb(monkeypatch, tmp_path):
    """No test reads or writes the settings, keys and caches of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))


def watch(folder, wandb=QUIET, resumed_epoch=0, wandb_id=None, **options):
    return Monitor(folder, RunConfig(name="run", wandb=wandb, **options), True, wandb_id, resumed_epoch)


def csv_lines(folder):
    return (folder / "metrics.csv").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# metrics.csv


def test_metrics_stand_in_the_order_of_recording_with_empty_fields_where_missing(tmp_path):
    with watch(tmp_path / "run") as run:
        figures = {"loss": 1.5, "top1": 40, "top5": 80.25, "lr": 0.01, "seconds": 3, "extra": 7}
        run.epoch(1, "train", figures, bits="random")
        run.epoch(1, "val", {"loss": 1.25, "top1": 50.0}, bits=6)
        run.epoch(1, "test", {"top1": 12.5})
    assert csv_lines(tmp_path / "run") == [HEADER, "1,train,random,1.5,40,80.25,0.01,3", "1,val,6,1.25,50,,,",
                                           "1,test,,,12.5,,,"]


def test_a_row_recorded_again_takes_the_place_of_the_first(tmp_path):
    run = watch(tmp_path)
    for top1 in (10, 20):
        run.epoch(0, "val", {"top1": top1})
        run.epoch(1, "val", {"top1": 2 * top1})
    assert csv_lines(tmp_path) == [HEADER, "0,val,,,20,,,", "1,val,,,40,,,"]


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="valid"):
        watch(tmp_path).epoch(1, "valid", {"loss": 1})


@pytest.mark.parametrize(("resumed", "kept"), [(0, [0]), (1, [0, 1, 1]), (2, [0, 1, 1, 2]), (9, [0, 1, 1, 2])])
def test_a_resumed_run_is_cut_back_to_its_checkpoint(tmp_path, resumed, kept):
    first = watch(tmp_path)
    for epoch, split in ((0, "val"), (1, "train"), (1, "val"), (2, "train")):
        first.epoch(epoch, split, {"top1": epoch})
    second = watch(tmp_path, resumed_epoch=resumed)
    assert [int(line.split(",")[0]) for line in csv_lines(tmp_path)[1:]] == kept
    second.epoch(resumed + 1, "train", {"loss": 0.5})
    assert csv_lines(tmp_path)[-1] == f"{resumed + 1},train,,0.5,,,,"


recorded = st.tuples(st.integers(0, 20), st.sampled_from(SPLITS), st.sampled_from(["", "6", "random"]),
                     st.floats(allow_infinity=False, allow_nan=False, width=16))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(recorded, max_size=6, unique_by=lambda row: row[:3]), lost=st.integers(0, 200))
def test_a_crash_at_any_byte_costs_the_torn_line_only(tmp_path, rows, lost):
    path = tmp_path / "metrics.csv"
    path.unlink(missing_ok=True)
    metrics = MetricsFile(path, 99, print)
    for epoch, split, bits, loss in rows:
        metrics.record(epoch, split, bits, {"loss": loss})
    whole = path.read_bytes()
    path.write_bytes(whole[:max(0, len(whole) - lost)])
    survivors = path.read_bytes().count(b"\n") - 1

    again = MetricsFile(path, 99, lambda text: None)

    assert again.rows == MetricsFile(path, 99, print).rows
    assert len(again.rows) == max(survivors, 0)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:1 + len(again.rows)])


@pytest.mark.parametrize("line", ["1,val,6,0.5\n", "1,val,6,0.5,1,2,3,4,5\n", "one,val,6,,,,,\n", "1,val,6,half,,,,\n",
                                  "1,nowhere,6,,,,,\n", "\x00\x00\x00\n", "\n", "1,val,6,0.5,1,2,3,4"])
def test_an_unreadable_line_is_dropped_and_reported(tmp_path, line, capsys):
    (tmp_path / "metrics.csv").write_text(f"{HEADER}\n1,train,,2,,,,\n{line}")
    watch(tmp_path, resumed_epoch=3)
    assert csv_lines(tmp_path) == [HEADER, "1,train,,2,,,,"]
    assert "metrics.csv: unreadable lines dropped: 1\n" in capsys.readouterr().out


def test_a_csv_file_of_someone_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match=r"metrics\.csv: not a metrics file.*step,loss"):
        watch(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,2\n"


# ---------------------------------------------------------------------------------------------------------------------
# Log, scoreboard, progress bar


def test_the_log_is_stamped_begins_with_the_versions_and_is_appended_to(tmp_path, capsys):
    watch(tmp_path).log("first\nsecond")
    watch(tmp_path).log("third")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    texts = [line[20:] for line in lines]
    assert re.match(r"versions: python 3\.\d+\.\d+, torch \d.*, torchvision .*, checkpoint format \d", texts[0])
    assert texts[1].startswith("device: cpu, 1 process, ")
    assert texts[2].startswith("command: ")
    assert texts[3:5] == ["first", "second"]
    assert texts[5] == texts[0]
    assert texts[-1] == "third"
    assert capsys.readouterr().out.splitlines() == texts


def test_a_step_is_one_line_of_aligned_figures(tmp_path, capsys):
    watch(tmp_path).step(3, 20, 100, loss=1.23449, lr=0.0001, top1=97.5, seen=640, tiny=0.00012345)
    line = "epoch 3 [ 20/100] loss 1.234 lr 0.0001 top1 97.500 seen 640 tiny 0.0001234"
    assert (tmp_path / "run.log").read_text().endswith(line + "\n")
    assert capsys.readouterr().out.endswith(line + "\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_images_and_is_silent_where_stderr_is_no_terminal(tmp_path, monkeypatch, capsys):
    run = watch(tmp_path)
    assert list(run.progress([1, 2, 3], "epoch 1", 32, 3)) == [1, 2, 3]
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(sys, "stderr", Terminal())
    seen = []
    for item in run.progress(iter("abc"), "epoch 1", 32, 3):
        seen.append(item)
        run.step(1, len(seen), 3, loss=1.0)
        run.log(f"note {item}")
    assert seen == ["a", "b", "c"]
    assert re.search(r"epoch 1: .*/96 \[.*images", sys.stderr.getvalue())
    out = capsys.readouterr().out
    assert "note b\n" in out
    assert "loss" not in out, "beside a bar, steps go to the log file only"
    assert (tmp_path / "run.log").read_text().count("loss 1.000") == 3
    run.step(2, 1, 3, loss=9.0)
    assert "loss 9.000" in capsys.readouterr().out, "the bar is gone"


def test_the_scoreboard_keeps_the_best_epochs_and_survives_a_resume(tmp_path, capsys):
    def board():
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Scoreboard")][-2:]

    config = {"log": LogConfig(num_best_scores=2)}
    run = watch(tmp_path, **config)
    for epoch, top1 in ((1, 80.0), (2, 97.5), (3, float("nan")), (4, 97.5), (5, 90.0)):
        for bits, difference in ((6, 2), (2, -2)):
            run.epoch(epoch, "val", {"top1": top1 + difference, "top5": 100}, bits=bits)
        run.epoch(epoch, "val", {"top1": 1, "top5": 1}, bits="random")
        run.scores(epoch, top1, 100)
    expected = ["Scoreboard best 1 ==> Epoch [2][Top1: 97.500   Top5: 100.000]",
                "Scoreboard best 2 ==> Epoch [4][Top1: 97.500   Top5: 100.000]"]
    assert board() == expected

    watch(tmp_path, resumed_epoch=5, **config).scores(6, 3, 4)
    assert board() == expected
    watch(tmp_path, resumed_epoch=2, **config).scores(3, 99, 100)
    assert board() == ["Scoreboard best 1 ==> Epoch [3][Top1: 99.000   Top5: 100.000]",
                       "Scoreboard best 2 ==> Epoch [2][Top1: 97.500   Top5: 100.000]"]


@given(st.permutations([(1, float("nan")), (2, 50.0), (3, 70.0), (4, 70.0), (5, 60.0)]))
def test_the_order_of_arrival_does_not_change_the_scoreboard_and_nan_is_worst(arrivals):
    best = best_epochs({epoch: (top1, 100.0) for epoch, top1 in arrivals}, 5)
    assert [epoch for epoch, _, _ in best] == [3, 4, 5, 2, 1]


def test_rows_of_the_whole_model_go_before_the_mean_over_candidates(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv", 0, print)
    metrics.record(1, "val", "6", {"top1": 10, "top5": 20})
    metrics.record(1, "val", "mean", {"top1": 30, "top5": 40})
    metrics.record(2, "val", "6", {"top1": 10, "top5": 20})
    metrics.record(2, "val", "", {"top1": 50, "top5": 60})
    metrics.record(2, "test", "", {"top1": 99, "top5": 99})
    assert best_epochs(metrics.scores(), 3) == [(2, 50, 60), (1, 30, 40)]


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def test_args_yaml_reads_back_as_the_same_configuration(tmp_path):
    config = RunConfig(name="größe", target_bits=[4, 2], lr=1e-4, gpu=[0, 1], wandb=WandbConfig("disabled", tags=["a"]))
    open_monitor(RunFolder(tmp_path / "run", config.name), config, ResumeState(), torch.device("cpu")).finish()
    assert load_config(RunConfig, [str(tmp_path / "run" / "args.yaml")]) == config


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/run: "):
        watch(tmp_path / "file" / "run")
    run = watch(tmp_path / "run")
    (tmp_path / "run" / "run.log").unlink()
    (tmp_path / "run" / "run.log").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/run: "):
        run.log("lost")


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    for package in ("wandb", "tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    config = RunConfig(name="run", wandb=WandbConfig(mode="online"))
    with Monitor(tmp_path / "run", config, is_main=False, wandb_id="abc") as run:
        assert list(run.progress([1, 2], "epoch 1", 1, 2)) == [1, 2]
        run.log("text")
        run.step(1, 1, 2, loss=1)
        run.epoch(1, "val", {"loss": 1})
        run.scores(1, 2, 3)
        run.save_plots()
    assert run.wandb_id == "abc"
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def curve_rows(labels=("6", "2", "random"), epochs=3):
    """Rows whose top-1 equals the epoch and is missing in epoch 2."""
    return [{"epoch": epoch, "split": split, "bits": label, "loss": position + 1 / epoch,
             "top1": None if epoch == 2 else epoch}
            for epoch in range(1, epochs + 1) for split in ("val", "train") for position, label in enumerate(labels)]


def test_curves_are_drawn_on_request_and_at_the_end_without_a_global_figure(tmp_path):
    run = watch(tmp_path)
    run.save_plots()
    assert not (tmp_path / "curves.png").exists(), "nothing to draw yet"
    for epoch in (1, 2):
        run.epoch(epoch, "val", {"loss": 1 / epoch, "top1": 40 * epoch}, bits=6)
    run.save_plots()
    early = (tmp_path / "curves.png").read_bytes()
    assert early.startswith(b"\x89PNG")
    run.epoch(3, "val", {"loss": 0.2, "top1": 90}, bits=6)
    run.finish()
    assert (tmp_path / "curves.png").read_bytes() != early


def test_curves_are_drawn_once_for_the_same_figures(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("engine.monitor.save_curves", lambda path, rows, title: drawn.append(len(rows)))
    with watch(tmp_path) as run:
        for epoch in (1, 2):
            run.epoch(epoch, "train", {"loss": 1})
            run.epoch(epoch, "val", {"top1": 40})
            run.scores(epoch, 40, 80)
        run.epoch(2, "test", {"top1": 40})
    assert drawn == [2, 4]


def test_each_split_and_candidate_has_a_line_with_its_figures():
    from matplotlib.figure import Figure

    axes, rows = Figure().subplots(), curve_rows()
    draw_panel(axes, rows, "top1", "top-1", colour_labels({"6", "2", "random"}))
    assert len(axes.lines) == 6
    assert all(list(line.get_xdata()) == [1, 3] == list(line.get_ydata()) for line in axes.lines)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 6


@given(st.sets(st.integers(1, 32), min_size=2))
@settings(deadline=None, max_examples=25)
def test_colours_are_distinct_and_ordered_from_dark_to_bright(bits):
    colours = colour_labels({str(bit) for bit in bits})
    assert list(colours) == [str(bit) for bit in sorted(bits, reverse=True)]
    brightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in colours.values()]
    assert all(darker < brighter for darker, brighter in zip(brightness, brightness[1:], strict=False))


def test_curves_of_one_epoch_or_nothing_but_tests(tmp_path):
    assert save_curves(tmp_path / "one.png", curve_rows(epochs=1), "one epoch")
    assert not save_curves(tmp_path / "none.png", [{"epoch": 1, "split": "test", "bits": "", "loss": 1, "top1": 1}], "")
    assert not (tmp_path / "none.png").exists()


def test_a_missing_plotting_library_costs_the_plot_only(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with watch(tmp_path) as run:
        run.epoch(1, "val", {"loss": 1.0})
    assert "no curves.png: " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# wandb, with a stand-in


class FakeRun:
    def __init__(self, wandb):
        self.id, self.url, self.wandb, self.logged, self.codes = "id123", "http://server/run", wandb, [], []

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, figures):
        self.logged.append(figures)
        if self.wandb.log_fails:
            raise RuntimeError("log is broken\nat length")

    def finish(self, exit_code=0):
        self.codes.append(exit_code)
        if self.wandb.finish_fails:
            raise TimeoutError("server gone")


class FakeWandb(types.ModuleType):
    """As much of wandb as the monitor uses; `failing` names the modes that do not start."""

    def __init__(self, failing=(), api_key=None, log_fails=False, finish_fails=False):
        super().__init__("wandb")
        self.failing, self.api_key, self.log_fails, self.finish_fails = failing, api_key, log_fails, finish_fails
        self.calls, self.run = [], FakeRun(self)

    def Settings(self, **values):
        return types.SimpleNamespace(**{"silent": None, "console": None, "init_timeout": None} | values)

    def setup(self, settings):
        return types.SimpleNamespace(settings=types.SimpleNamespace(api_key=self.api_key,
                                                                    base_url="https://api.wandb.ai"))

    def init(self, **options):
        self.calls.append(options)
        if options["mode"] in self.failing:
            raise ConnectionError(f"{options['mode']} is out of reach")
        return self.run


@pytest.fixture
def install(monkeypatch):
    def put(wandb):
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb
    return put


@pytest.mark.parametrize(("mode", "variable", "key", "started"), [
    ("auto", None, None, ["offline"]),
    ("auto", None, "k" * 40, ["online"]),
    ("auto", "offline", "k" * 40, ["offline"]),
    ("auto", "dryrun", "k" * 40, ["offline"]),
    ("auto", "disabled", "k" * 40, []),
    ("auto", "online", None, ["offline"]),
    ("auto", "nonsense", "k" * 40, ["online"]),
    ("online", "disabled", "k" * 40, ["online"]),
    ("offline", "online", "k" * 40, ["offline"]),
    ("disabled", "online", "k" * 40, []),
])
def test_which_mode_wandb_starts_in(tmp_path, monkeypatch, install, mode, variable, key, started):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    wandb = install(FakeWandb(api_key=key))
    watch(tmp_path, WandbConfig(mode=mode))
    assert [call["mode"] for call in wandb.calls] == started


@pytest.mark.parametrize(("host", "found"), [("api.wandb.ai", True), ("elsewhere.org", False)])
def test_a_netrc_entry_for_the_server_counts_as_a_key(tmp_path, install, host, found):
    Path(os.environ["NETRC"]).write_text(f"machine {host}\n login user\n password {'k' * 40}\n")
    wandb = install(FakeWandb())
    watch(tmp_path, WandbConfig())
    assert wandb.calls[0]["mode"] == ("online" if found else "offline")


def test_a_run_carries_its_settings_and_figures_and_is_continued_by_its_id(tmp_path, install):
    wandb = install(FakeWandb(api_key="k" * 40))
    with watch(tmp_path, WandbConfig(project="p", entity="e", tags=["t"]), wandb_id="old") as run:
        run.epoch(2, "val", {"loss": 1.5, "top1": 50}, bits=6)
        run.epoch(2, "test", {"top1": 51})
    call = wandb.calls[0]
    expected = {"id": "old", "resume": "allow", "project": "p", "entity": "e", "tags": ["t"], "dir": str(tmp_path),
                "name": "run"}
    assert {key: call[key] for key in expected} == expected
    assert vars(call["settings"]) == {"silent": True, "console": "off", "init_timeout": 20}, "and none it does not know"
    assert call["config"]["quan"]["weight"]["mode"] == "lsq"
    assert wandb.run.logged == [{"epoch": 2, "val/loss_6_bits": 1.5, "val/top1_6_bits": 50},
                                {"epoch": 2, "test/top1": 51}]
    assert wandb.run.codes == [0]
    assert run.wandb_id == "id123"


@pytest.mark.parametrize("package", [None, types.ModuleType("wandb")], ids=["absent", "a mere folder"])
def test_without_wandb_auto_goes_on_and_an_explicit_mode_is_an_error(tmp_path, install, capsys, package):
    install(package)
    with watch(tmp_path / "auto", WandbConfig(), wandb_id="kept") as run:
        run.epoch(1, "val", {"loss": 1})
    assert capsys.readouterr().out.count("no wandb (not installed; pip install wandb)") == 1
    assert run.wandb_id == "kept"
    for mode in ("online", "offline"):
        with pytest.raises(UserError, match=f"^wandb.mode: '{mode}'.*pip install wandb"):
            watch(tmp_path / mode, WandbConfig(mode=mode))
        assert not (tmp_path / mode).exists()


def test_online_without_a_key_is_an_error_and_no_question(tmp_path, install):
    wandb = install(FakeWandb())
    with pytest.raises(UserError, match="^wandb.mode: 'online' needs an API key"):
        watch(tmp_path / "run", WandbConfig(mode="online"))
    assert not wandb.calls
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", [("online",), ("online", "offline")])
def test_a_start_that_fails_falls_back_with_one_line_each(tmp_path, install, capsys, failing):
    wandb = install(FakeWandb(failing, api_key="k" * 40))
    with watch(tmp_path, WandbConfig(mode="online")) as run:
        run.epoch(1, "val", {"loss": 1})
    out = capsys.readouterr().out
    assert [call["mode"] for call in wandb.calls] == ["online", "offline"]
    assert [f"wandb does not start {mode}: {mode} is out of reach" in out for mode in ("online", "offline")] == [
        True, "offline" in failing]
    assert len(wandb.run.logged) == (0 if "offline" in failing else 1)


def test_a_failure_while_logging_switches_wandb_off_once(tmp_path, install, capsys):
    wandb = install(FakeWandb(log_fails=True))
    with watch(tmp_path, WandbConfig()) as run:
        for epoch in (1, 2, 3):
            run.epoch(epoch, "val", {"loss": 1})
    assert len(wandb.run.logged) == 1
    assert capsys.readouterr().out.count("wandb is switched off: log is broken\n") == 1
    assert len(csv_lines(tmp_path)) == 4


def test_a_server_lost_at_the_end_is_one_line(tmp_path, install, capsys):
    install(FakeWandb(finish_fails=True))
    watch(tmp_path, WandbConfig()).finish()
    assert "sends what the run folder holds): server gone" in capsys.readouterr().out


def test_finishing_twice_closes_once(tmp_path, install):
    wandb = install(FakeWandb())
    with watch(tmp_path, WandbConfig()) as run:
        run.epoch(1, "val", {"loss": 1})
        run.finish()
        (tmp_path / "curves.png").unlink()
        run.finish()
    assert wandb.run.codes == [0]
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("error", "code"), [(ValueError("bad\nlong"), 1), (KeyboardInterrupt(), 1), (SystemExit(3), 1),
                                             (SystemExit(0), 0)])
def test_an_exception_passes_through_and_closes_wandb_as_failed(tmp_path, install, error, code):
    wandb = install(FakeWandb())
    with pytest.raises(type(error)), watch(tmp_path, WandbConfig()) as run:
        run.epoch(1, "val", {"loss": 1.0, "top1": 2.0})
        raise error
    assert wandb.run.codes == [code]
    assert (tmp_path / "curves.png").exists()
    assert (f"stopped by {type(error).__name__}" in (tmp_path / "run.log").read_text()) == bool(code)


def test_a_broken_disk_does_not_hide_the_error_that_stopped_the_run(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), watch(tmp_path) as run:
        (tmp_path / "run.log").unlink()
        (tmp_path / "run.log").mkdir()
        run.step(1, 1, 0 // 0)
    assert "could not be closed" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# wandb itself, in a process of its own: it keeps settings until it is torn down

PROGRAM = """
import os, sys
from engine import monitor, wandb_run
from engine.schema import RunConfig, WandbConfig
assert not {"wandb", "matplotlib"} & sys.modules.keys(), "imported without need"
wandb_run.WANDB_INIT_TIMEOUT = 1

def train(folder, mode, wandb_id=None):
    with monitor.Monitor(folder, RunConfig(name="run", wandb=WandbConfig(mode=mode)), True, wandb_id) as run:
        run.epoch(1, "val", {"loss": 1.5}, bits=6)
    print("ID", run.wandb_id)
    sys.modules["wandb"].teardown()
    return run.wandb_id

train("run", "offline", train("run", "auto"))
os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="k" * 40)
train("unreached", "auto")
assert "matplotlib.pyplot" not in sys.modules, "global figures"
"""


def test_wandb_offline_resumed_and_with_its_server_out_of_reach(tmp_path):
    pytest.importorskip("wandb")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, timeout=120, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(STAGE)})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out, resumed, unreached = ([line for line in part.splitlines() if "wandb" in line or line.startswith(" ")]
                               for part in done.stdout.split("ID")[:3])
    identity = done.stdout.partition("ID ")[2].split()[0]
    # An offline run lies in the run's folder; a resumed one is a second segment of it.
    assert out == ["wandb keeps the run offline (no API key configured)", f"wandb: offline, run {identity}"]
    assert resumed == [f" {identity}", f"wandb: offline, run {identity}"]
    segments = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(segments) == 2
    assert all(b"val/loss_6_bits" in segment.read_bytes() for segment in segments)
    # A server out of reach does not stop the run.
    again, failed, told = unreached
    assert again == f" {identity}"
    assert failed.startswith("wandb does not start online: ")
    assert told.startswith("wandb: offline, run ") and identity not in told
    assert csv_lines(tmp_path / "unreached")[-1] == "1,val,6,1.5,,,,"
