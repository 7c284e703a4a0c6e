"""make check-gpu: what the tests cannot see on machines without a GPU, on one, in at most 4 minutes.

python tests/check_gpu.py [--device cpu] [--only CHECK ...]

Every stage from the demo's files at a small size, one process over nccl, bfloat16, a run that was killed, the kernels against
float64, a lack of memory, the loader's side stream, compute-sanitizer where it is installed. PuLP and wandb are not needed.
Ends with a table; the exit status is 1 where a check failed, and 2 without a GPU. --device cpu runs what a CPU can.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGES = PRETRAINING, SEARCH, TRAINING = "indicators_pretraining", "quantization_search", "quantization_training"
SECONDS, COMMAND_SECONDS = 240, 90  # of all, and of a command
JOINT, TUNED = "resnet20_digits", "resnet20_digits_w3a3"
INDICATORS, POLICY = "results/i.pkl", "results/policy_resnet20_digits_w3a3.yaml"
NO_MEMORY = """
import sys, torch
sys.path.insert(0, ".")
import main
from util.errors import user_errors_on_one_line
torch.cuda.set_per_process_memory_fraction(1e-4)
with user_errors_on_one_line():
    main.main(sys.argv[1:])
"""


class NotRun(Exception):
    """Why a check cannot be run here."""


class Checks:
    """The checks, on copies of the stages in the folder `place`; each raises where it fails."""

    def __init__(self, device, place):
        self.device, self.place, self.end = device, place, time.monotonic() + SECONDS
        self.small = [f"training_device={'gpu' if device == 'cuda' else 'cpu'}", "dataloader.input_size=8", "epochs=1",
                      "dataloader.batch_size=32", "dataloader.data_fraction=0.2"]
        for stage in STAGES:
            shutil.copytree(ROOT / stage, place / stage, ignore=shutil.ignore_patterns("results", "__pycache__", "tests"))

    def command(self, stage, *words, expect=0, runner=(sys.executable,)):
        """Run `python WORDS` in a stage; what it said."""
        started = subprocess.Popen([*runner, *words], cwd=self.place / stage, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)
        try:
            stdout, stderr = started.communicate(timeout=min(COMMAND_SECONDS, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # with what it has started
            raise AssertionError(f"{words[0]} did not end in time") from None
        if started.returncode != expect:
            raise AssertionError(f"status {started.returncode} of {words[0]}: {(stderr.strip() or '-').splitlines()[-1]}")
        return stderr if expect else stdout

    def joint(self, name, *words, launcher=()):
        self.command(PRETRAINING, *launcher, "main.py", "config_resnet20_digits.yaml", *self.small, f"name={name}",
                     "pre_trained=false", "dataloader.deterministic=true", *words)

    def checkpoint(self, name):
        return self.place / PRETRAINING / f"results/{name}/{name}_checkpoint.pth.tar"

    def losses(self, name):
        """{bits: training loss} of a joint training."""
        with open(self.checkpoint(name).with_name("metrics.csv"), encoding="utf-8") as file:
            return {row["bits"]: float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"}

    def check_close(self, name):
        """That the losses of a joint training are finite, and near those of the first one."""
        for bits, loss in self.losses(JOINT).items():
            assert abs(self.losses(name)[bits] - loss) < 0.05 * loss, f"loss at {bits} bits: {self.losses(name)[bits]}, {loss}"

    def check_same(self, *names):
        """That two joint trainings end in the same network."""
        one, other = (torch.load(self.checkpoint(name), weights_only=True)["state_dict"] for name in names)
        differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
        assert not differing, f"{len(differing)} tensors differ, the first is {differing[0]}"

    def pretraining(self):
        self.command(TRAINING, "main.py", "config_resnet20_digits.yaml", *self.small, "warmup_epochs=0")
        self.joint(JOINT)

    def extraction(self):
        self.command(PRETRAINING, "importance_extractor.py", str(self.checkpoint(JOINT)), "--output", INDICATORS)

    def policy(self):
        """By the search, or without PuLP 3 bits everywhere."""
        if importlib.util.find_spec("pulp"):
            self.command(SEARCH, "search.py", "--model", "resnet20", "--i", f"../{PRETRAINING}/{INDICATORS}", "--b",
                         *"65432", "--wb", "3", "--ab", "3", "--cr", "10.59", "--bops", "True", "--output", POLICY)
            return
        names = pickle.loads((self.place / PRETRAINING / INDICATORS).read_bytes())["layer_name"]
        (self.place / SEARCH / "results").mkdir(exist_ok=True)
        (self.place / SEARCH / POLICY).write_text(yaml.safe_dump(
            {"arch": "resnet20", "layer_name": names, "weight_bits": [3] * len(names), "act_bits": [3] * len(names)}))

    def finetuning(self):
        self.command(TRAINING, "main.py", f"finetune_{TUNED}.yaml", *self.small)

    def evaluation(self):
        said = self.command(TRAINING, "main.py", f"eval_{TUNED}.yaml", *self.small[:2], *self.small[3:4])  # the same batches
        reached = yaml.safe_load((self.place / TRAINING / f"results/{TUNED}/summary.yaml").read_text())
        assert f"top-1 {reached['top1']:.3f}" in said, said

    def export(self):
        said = self.command(TRAINING, "export.py", f"results/{TUNED}/{TUNED}_checkpoint.pth.tar", "--output",
                            "results/model.safetensors")
        assert "bit for bit" in said, said

    def bfloat16(self):
        self.joint("bf16", "precision=bf16")
        self.check_close("bf16")

    def recorded_passes(self):
        """Passes that are recorded end in the very bits of those that are not."""
        self.joint("one_by_one", "cuda_graphs=false")
        self.check_same(JOINT, "one_by_one")
        if self.device == "cuda":
            logs = [self.checkpoint(name).with_name(f"{name}.log").read_text() for name in (JOINT, "one_by_one")]
            assert ["recorded as CUDA graphs" in log for log in logs] == [True, False]

    def one_launched_process(self):
        """Over nccl on a GPU, over gloo on a CPU."""
        self.joint("launched", launcher=("-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"))
        self.check_close("launched")

    def resuming(self):
        """A run that was killed inside an epoch ends in the very bits of one that was not."""
        words = ["main.py", "config_resnet20_digits.yaml", *self.small, "name=killed", "pre_trained=false",
                 "dataloader.deterministic=true", "log.checkpoint_steps=1"]
        run = subprocess.Popen([sys.executable, *words], cwd=self.place / PRETRAINING, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        while run.poll() is None and not self.checkpoint("killed").exists() and time.monotonic() < self.end:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL and "inside" in torch.load(self.checkpoint("killed"), weights_only=True)
        self.command(PRETRAINING, *words)
        self.check_same(JOINT, "killed")

    def kernels(self):
        """Values equal to tensor operations, gradients near to float64."""
        sys.path.insert(0, str(ROOT / PRETRAINING))
        from quan.quantizer import kernel
        from quan.quantizer.lsq import gradients
        kernel.use("compiled", self.device)
        types, generator = (torch.float32, torch.bfloat16), torch.Generator().manual_seed(0)
        shapes = [(1,), (3, 70), (2, 6, 1, 9), (64, 3, 7, 7), (8, 64, 57, 57), (0, 3)]
        for shape, dtype, per_channel, last in itertools.product(shapes, types, (False, True), (False, True)):
            v = (torch.randn(shape, generator=generator) * 3).to(self.device, dtype)
            v = v.contiguous(memory_format=torch.channels_last) if last and v.dim() == 4 else v
            steps = torch.rand(3, *shape[:per_channel], generator=generator).to(self.device)[1] + 0.05
            steps = steps.view(-1, *[1] * (v.dim() - 1)) if per_channel else steps
            grad, changes, scaled = torch.randn_like(v), [], v.float() / steps
            assert torch.equal(kernel.quantize(v, steps, 8, 7, dtype), (scaled.clamp(-8, 7).round() * steps).to(dtype))
            grad_v, grad_s = gradients(grad, v, steps, 8, 7, changes=changes)
            inside, integers = (scaled >= -8) & (scaled <= 7), scaled.clamp(-8, 7).round().double()
            assert torch.equal(grad_v, torch.where(inside, grad, 0)), f"gradient of v, {shape}, {dtype}"
            for found, slope in ((grad_s, integers - torch.where(inside, scaled, 0)),
                                 (changes[0], (integers - scaled.double()) * steps.double())):
                terms = grad.double() * slope
                error = (found - terms.sum_to_size(found.shape)).abs()
                assert (error <= 1e-6 * terms.abs().sum_to_size(found.shape)).all(), f"a sum, {shape}, {dtype}"

    def side_stream(self):
        """Batches that a side stream moves are those that were read, while kernels keep the GPU busy."""
        self.only_on_a_gpu()
        sys.path.insert(0, str(ROOT / PRETRAINING))
        from util.data_loader import SideStream, one_ahead
        stream, busy = SideStream(torch.device("cuda", 0)), torch.randn(4096, 4096, device="cuda")
        batches = [[torch.full((2**22,), number, dtype=torch.uint8).pin_memory()] for number in range(20)]
        for number, (moved,) in enumerate(one_ahead(batches, stream.begin, stream.finish)):
            busy = (busy @ busy).clamp(-1, 1)
            assert bool((moved == number).all()), f"batch {number}"

    def lack_of_memory(self):
        self.only_on_a_gpu()
        said = self.command(PRETRAINING, "-c", NO_MEMORY, "config_resnet20_digits.yaml", *self.small, "name=large",
                            "pre_trained=false", "dataloader.batch_size=256", "dataloader.data_fraction=1.0", expect=2)
        assert said.count("\n") == 1 and "out of memory" in said and "dataloader.batch_size" in said, said

    def sanitizer(self):
        """No kernel reads or writes where it may not."""
        self.only_on_a_gpu()
        if not shutil.which("compute-sanitizer"):
            raise NotRun("compute-sanitizer is not installed")
        self.command(".", str(Path(__file__).resolve()), "--only", "kernels",
                     runner=("compute-sanitizer", "--error-exitcode=9", sys.executable))

    def only_on_a_gpu(self):
        if self.device != "cuda":
            raise NotRun("needs a GPU")


CHECKS = ("pretraining", "recorded_passes", "extraction", "policy", "finetuning", "evaluation", "export",
          "one_launched_process", "bfloat16", "resuming", "kernels", "side_stream", "lack_of_memory", "sanitizer")


def outcome(check, seconds_left):
    """("passed", "failed" or "not run", and why)."""
    try:
        if seconds_left <= 0:
            raise NotRun(f"the {SECONDS} seconds are over")
        check()
    except NotRun as why:
        return "not run", str(why)
    except Exception as error:  # whatever it is, the other checks are still worth their time
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "passed", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, metavar="CHECK", help=", ".join(CHECKS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("check-gpu: this machine has no GPU; --device cpu runs what a CPU can", file=sys.stderr)
        sys.exit(2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(options.device, Path(folder))
        for name in options.only:
            begun = time.monotonic()
            rows.append((name, *outcome(getattr(checks, name), checks.end - begun), time.monotonic() - begun))
            print("{0:<22} {1:<8} {3:>6.1f} s  {2}".format(*rows[-1]), flush=True)
    counts = {word: sum(row[1] == word for row in rows) for word in ("passed", "failed", "not run")}
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
