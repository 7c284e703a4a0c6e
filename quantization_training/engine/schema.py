"""The configuration of a training run: the sections and keys that every training stage has, with LIMPQ's names."""

import types
import typing
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from quan.config import QuanConfig
from util.config import AUTO, bounded, check_bits, describe
from util.errors import UserError

MAX_NAME = 150




@dataclass(frozen=True)
class DataConfig:
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "digits", "folder"] = "imagenet"
    num_classes: int | None = bounded(None, low=2)
    path: str | None = None
    batch_size: int = bounded(64, low=1)
    workers: int = bounded(4, low=0)
    deterministic: bool = False
    serialized: bool = False
    val_split: float = bounded(0.0, low=0, below=1)
    data_fraction: float = bounded(1.0, above=0, high=1)
    input_size: int | None = bounded(None, low=4)
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class ResumeConfig:
    path: str = "auto"
    lean: bool = False


@dataclass(frozen=True)
class LogConfig:
    num_best_scores: int = bounded(3, low=1)
    print_freq: int = bounded(20, low=1)
    checkpoint_steps: int | None = bounded(None, low=1)
    keep_checkpoints: int = bounded(1, low=1)


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "limpqp"
    entity: str | None = None
    tags: list[str] | None = None


@dataclass(frozen=True)
class RunConfig:
    """What every training run is made of. The keys are LIMPQ's, so that its YAML files run unchanged. New is final_test:
    whether a finished run is evaluated on the test set, which runs that choose hyper-parameters leave alone.

    Not keys: LIMPQ_TEMPLATE, what LIMPQ takes for keys that a YAML file leaves out; given, the keys of the first level that
    stand in the files or on the command line, None where the configuration was not read by load_config."""

    LIMPQ_TEMPLATE: ClassVar = types.MappingProxyType({})
    given: ClassVar = None

    name: str = "run"
    output_dir: str = "results"
    seed: int = bounded(0, low=0, high=2**31)
    training_device: Literal["auto", "gpu", "cpu"] = "auto"
    gpu: typing.Any = None
    threads: int | None = bounded(None, low=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    kernels: Literal["auto", "compiled", "plain"] = "auto"
    arch: str = "resnet50"
    pre_trained: bool | str = False
    target_bits: list[int] = field(default_factory=lambda: [6, 5, 4, 3, 2])
    freeze_weights: bool = False
    eval: bool = False
    final_test: bool = True
    fp_model: bool = False

    dataloader: DataConfig = DataConfig()
    resume: ResumeConfig = ResumeConfig()
    log: LogConfig = LogConfig()
    wandb: WandbConfig = WandbConfig()
    quan: QuanConfig = QuanConfig()

    epochs: int = bounded(10, low=1)
    smoothing: float = bounded(0.0, low=0, below=1)
    opt: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    lr: float = bounded(0.01, above=0)
    momentum: float = bounded(0.9, low=0, below=1)
    weight_decay: float = bounded(1e-4, low=0)
    sched: Literal["cosine", "step", "multistep", "constant"] = "cosine"
    lr_per: Literal["step", "epoch"] = "step"
    min_lr: float = bounded(0.0, low=0)
    decay_rate: float = bounded(0.1, above=0, high=1)
    decay_epochs: float | list[float] = bounded(30, above=0)
    warmup_epochs: float = bounded(0, low=0)
    warmup_lr: float = bounded(0.0, low=0)
    cooldown_epochs: int = bounded(0, low=0)
    val_cycle: int = bounded(1, low=1)
    weight_bits: int | list[int] | None = None
    act_bits: int | list[int] | None = None

    def __post_init__(self):
        if not self.name.isprintable() or "/" in self.name or self.name in ("", ".", "..") or len(self.name) > MAX_NAME:
            raise UserError(f"name: {describe(self.name)} cannot name a folder")
        for statistic in ("mean", "std"):
            values = getattr(self.dataloader, statistic)
            if values is not None and (len(values) != 3 or (statistic == "std" and min(values) <= 0)):
                raise UserError(f"dataloader.{statistic}: found {values}, expected three numbers, one per colour channel")
        if self.quan.weight.all_positive:
            raise UserError("quan.weight.all_positive: weights are always signed; leave it false")
        if self.quan.excepts != AUTO:
            for name, entry in self.quan.excepts.items():
                if entry.weight.all_positive:
                    raise UserError(f"quan.excepts.{name}.weight.all_positive: weights are always signed; leave it false")
        if self.quan.act.per_channel:
            raise UserError("quan.act.per_channel: activations have one step size per layer; leave it false")
        check_bits("target_bits", self.target_bits)

    @property
    def last_epoch(self):
        """The number of epochs after which training is finished."""
        return self.epochs + self.cooldown_epochs

    def idle(self):
        """{key: why} of the keys, and sections, that nothing reads in such a run."""
        bits = dict.fromkeys(("quan.weight.bit", "quan.act.bit"), "target_bits, or a policy, says the bits")
        idle = {"gpu": "a note", "dataloader.serialized": "a note", **bits,
                "quan.act.init": "activations start from their first batch"}
        if self.sched not in ("step", "multistep"):
            idle.update(dict.fromkeys(("decay_rate", "decay_epochs"), f"sched: {self.sched}"))
        if self.sched == "constant":
            idle["min_lr"] = "sched: constant"
        if not self.warmup_epochs:
            idle["warmup_lr"] = "no warmup_epochs"
        if self.opt in ("adam", "adamw"):
            idle["momentum"] = f"opt: {self.opt}"
        return idle


def describe_defaults(config):
    """A line on the keys that were not given and for which LIMPQ has another default; '' where there are none."""
    if config.given is None or config.fp_model:
        return ""
    taken = [f"{key} {getattr(config, key):g} (LIMPQ: {value:g})" for key, value in config.LIMPQ_TEMPLATE.items()
             if key not in config.given and getattr(config, key) != value]
    return f"not given, so the defaults: {', '.join(taken)}; see docs/coming_from_limpq.md" if taken else ""
