"""The `quan:` section of a configuration."""

from dataclasses import dataclass
from typing import Literal

from util.config import AUTO, bounded


@dataclass(frozen=True)
class QuantizerConfig:
    mode: Literal["lsq"] = "lsq"
    bit: int | None = bounded(None, low=2, high=8)
    per_channel: bool = False
    symmetric: bool = False
    all_positive: bool = False
    init: Literal["lsq", "three_sigma"] = "lsq"


@dataclass(frozen=True)
class ActQuantizerConfig(QuantizerConfig):
    all_positive: Literal["auto"] | bool = AUTO


@dataclass(frozen=True)
class ExceptedQuantizerConfig:
    bit: int | None = bounded(None, low=2, high=8)
    all_positive: Literal["auto"] | bool | None = None


@dataclass(frozen=True)
class ExceptionConfig:
    act: ExceptedQuantizerConfig = ExceptedQuantizerConfig()
    weight: ExceptedQuantizerConfig = ExceptedQuantizerConfig()


@dataclass(frozen=True)
class QuanConfig:
    """excepts: layers, and BatchNorms, by name; auto: the first convolution, its BatchNorm and the classifier, which the
    graph of the network shows; none: the empty section."""

    act: ActQuantizerConfig = ActQuantizerConfig()
    weight: QuantizerConfig = QuantizerConfig()
    excepts: Literal["auto", "none"] | dict[str, ExceptionConfig] = AUTO

    def __post_init__(self):
        if self.excepts == "none":
            object.__setattr__(self, "excepts", {})
