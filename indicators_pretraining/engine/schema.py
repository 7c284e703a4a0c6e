"""The configuration of a training run: the sections and keys that every training stage has, with LIMPQ's names."""

import types
import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

from quan.config import QuanConfig
from util.config import AUTO, check_bits, describe, option, refuse_if

MAX_NAME = 150
NAME = "Name of the run, and of its run folder under output_dir."


@dataclass(frozen=True)
class DataConfig:
    dataset: Literal["imagenet", "cifar10", "cifar100", "fashion_mnist", "digits", "folder"] = option(
        "imagenet", help="The data set; imagenet and folder are a folder of images per class under train/ and val/.")
    num_classes: int | None = option(
        None, low=2, help="Number of classes; blank: that of the data set, for folder the number of folders under train/.")
    path: str | None = option(None, help="Where the files lie; digits needs none.")
    batch_size: int = option(64, low=1, help="Images per batch and process.")
    workers: int = option(4, low=0, help="Worker processes that read image files, per process.")
    deterministic: bool = option(False, help="Use repeatable GPU kernels.")
    serialized: bool = option(False, help="Read from LIMPQ's files and without effect.")
    val_split: float = option(
        0.0, low=0, below=1, help="Share of the training images held out for validation; 0: validation uses the test images.")
    data_fraction: float = option(
        1.0, above=0, high=1, help="Share of the remaining training images that is trained on, balanced over the classes.")
    input_size: int | None = option(
        None, low=4, help="Height and width of the images in pixels; blank: 224 for imagenet and folder, else 32. Fixed for "
                          "CIFAR and Fashion-MNIST.")
    mean: list[float] | None = option(
        None, help="Mean of the three colour channels for normalisation, of pixels from 0 to 1; blank: that of the data set, "
                   "ImageNet's for folder.")
    std: list[float] | None = option(
        None, help="Standard deviation of the three colour channels for normalisation; blank: that of the data set, "
                   "ImageNet's for folder.")


@dataclass(frozen=True)
class ResumeConfig:
    path: str = option(
        "auto", help="auto: where this run stopped (with eval: its best checkpoint); none: refuse a begun run; or a path.")
    lean: bool = option(False, help="Take only the weights of the checkpoint in resume.path, not its optimizer and epoch.")


@dataclass(frozen=True)
class LogConfig:
    num_best_scores: int = option(3, low=1, help="How many of the best epochs the log lists.")
    print_freq: int = option(20, low=1, help="Batches between two lines of the log.")
    checkpoint_steps: int | None = option(
        None, low=1, help="Steps between two checkpoints inside an epoch; blank: only one per epoch.")
    keep_checkpoints: int = option(1, low=1, help="How many checkpoints of the last epochs are kept.")


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", help="Whether the run is logged to wandb; auto: online where an API key is configured, else offline.")
    project: str = option("limpqp", help="The wandb project.")
    entity: str | None = option(None, help="The wandb user or team; blank: the default of the account.")
    tags: list[str] | None = option(None, help="Tags of the run in wandb.")


@dataclass(frozen=True)
class RunConfig:
    """What every training run is made of. The keys are LIMPQ's, so that its YAML files run unchanged."""

    LIMPQ_TEMPLATE: ClassVar = types.MappingProxyType({})  # what LIMPQ takes for keys that a YAML file leaves out
    given: ClassVar = None  # the keys of the first level that load_config found

    name: str = option("run", help=NAME)
    output_dir: str = option("results", help="The folder of the run folders.")
    seed: int = option(
        0, low=0, high=2**31, help="Seed of image order, augmentation, validation split, initial weights, random bit-widths.")
    training_device: Literal["auto", "gpu", "cpu"] = option("auto", help="Where to compute; auto: a GPU where there is one.")
    gpu: typing.Any = option(None, help="Read from LIMPQ's files and without effect.")
    threads: int | None = option(
        None, low=1, help="CPU threads per process; blank: as many as the run began with, at first all cores, shared out.")
    precision: Literal["fp32", "bf16"] = option(
        "fp32", help="bf16: compute the passes in bfloat16 (autocast); step sizes, optimizer and evaluation stay in float32.")
    cuda_graphs: bool = option(
        True, help="On a GPU, record the passes of training and play them back; false for a network whose forward pass does "
                   "not always do the same.")
    compile: bool | None = option(None, help="Read from configurations of earlier versions and without effect.")
    kernels: Literal["auto", "compiled", "plain"] = option(
        "auto", help="Quantizers: compiled (on a CPU loops, by a C++ compiler; on a GPU Triton kernels), or plain tensor "
                     "operations; auto: compiled where the compiler is there.")
    keep_freed_memory: bool = option(
        True, help="Let the C library keep the memory that a step frees, for the next one; faster on CPUs. glibc only.")
    arch: str = option(
        "resnet50", help="The network: a name of this project or of torchvision, timm:NAME, or path/to/file.py:factory.")
    pre_trained: bool | str = option(
        False, help="Initial weights: true takes torchvision's or timm's, a path those of a full-precision checkpoint.")
    target_bits: list[int] = option(
        [6, 5, 4, 3, 2], help="The candidate bit-widths, in the order of the passes of joint training.")
    freeze_weights: bool = option(False, help="Train only step sizes and normalization, not the weights of layers.")
    eval: bool = option(False, help="Evaluate a checkpoint instead of training.")
    final_test: bool = option(
        True, help="Evaluate a finished run on the test set; false where hyper-parameters are being chosen.")
    fp_model: bool = option(False, help="Train in full precision, without quantizers; stage 3 only.")

    dataloader: DataConfig = option(DataConfig(), help="The data, and how it is read.")
    resume: ResumeConfig = option(ResumeConfig(), help="Which checkpoint a run continues from.")
    log: LogConfig = option(LogConfig(), help="What is printed and kept.")
    wandb: WandbConfig = option(WandbConfig(), help="Logging to Weights & Biases.")
    quan: QuanConfig = option(QuanConfig(), help="The quantizers.")

    epochs: int = option(10, low=1, help="Epochs of training, without cooldown_epochs.")
    smoothing: float = option(0.0, low=0, below=1, help="Label smoothing of the training loss.")
    opt: Literal["sgd", "momentum", "adam", "adamw"] = option(
        "sgd", help="The optimizer; sgd has Nesterov momentum, momentum the plain one.")
    lr: float = option(0.01, above=0, help="The highest learning rate.")
    momentum: float = option(0.9, low=0, below=1, help="Momentum of sgd and momentum.")
    weight_decay: float = option(1e-4, low=0, help="Weight decay; step sizes, biases and normalization get none.")
    sched: Literal["cosine", "step", "multistep", "constant"] = option(
        "cosine", help="The learning-rate schedule after the warm-up.")
    lr_per: Literal["step", "epoch"] = option(
        "step", help="Whether the learning rate changes with each step, or once per epoch as in LIMPQ.")
    min_lr: float = option(0.0, low=0, help="The lowest learning rate of the schedule.")
    decay_rate: float = option(0.1, above=0, high=1, help="Factor of each decay in sched: step and multistep.")
    decay_epochs: float | list[float] = option(
        30, above=0, help="Epochs between two decays in sched: step; the list of epochs that decay in multistep.")
    warmup_epochs: float = option(0, low=0, help="Epochs over which the learning rate rises from warmup_lr to lr.")
    warmup_lr: float = option(0.0, low=0, help="The learning rate that the warm-up begins with.")
    cooldown_epochs: int = option(0, low=0, help="Further epochs at the learning rate that the schedule ends with.")
    val_cycle: int = option(
        1, low=1, help="Epochs between two validations; the last epoch is one, in stage 3 also the first and the last 15.")
    weight_bits: int | list[int] | None = option(
        None, help="Bit-widths of the weights of the searched layers, one number or a list in their order; read by stage 3.")
    act_bits: int | list[int] | None = option(
        None, help="Bit-widths of the inputs of the searched layers, one number or a list in their order, 32: full precision; "
                   "read by stage 3.")

    def __post_init__(self):
        refuse_if(not self.name.isprintable() or "/" in self.name or self.name in ("", ".", "..")
                  or len(self.name) > MAX_NAME, f"name: {describe(self.name)} cannot name a folder")
        for statistic in ("mean", "std"):
            values = getattr(self.dataloader, statistic)
            refuse_if(values is not None and (len(values) != 3 or (statistic == "std" and min(values) <= 0)),
                      f"dataloader.{statistic}: found {values}, expected three numbers"
                      f"{' above 0' * (statistic == 'std')}, one per colour channel")
        excepts = {} if self.quan.excepts == AUTO else self.quan.excepts
        weights = {"quan": self.quan, **{f"quan.excepts.{name}": entry for name, entry in excepts.items()}}
        for section, entry in weights.items():
            refuse_if(entry.weight.all_positive,
                      f"{section}.weight.all_positive: weights are always signed; leave it false")
        refuse_if(self.quan.act.per_channel,
                  "quan.act.per_channel: activations have one step size per layer; leave it false")
        check_bits("target_bits", self.target_bits)

    @property
    def last_epoch(self):
        """The number of epochs after which training is finished."""
        return self.epochs + self.cooldown_epochs

    def idle(self):
        """{key: why} of the keys, and sections, that nothing reads in such a run."""
        bits = dict.fromkeys(("quan.weight.bit", "quan.act.bit"), "target_bits, or a policy, says the bits")
        idle = {"gpu": "a note", "dataloader.serialized": "a note", "compile": "kernels and cuda_graphs do more", **bits,
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
