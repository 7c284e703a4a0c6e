"""The `quan:` section of a configuration."""

from dataclasses import dataclass
from typing import Literal

from util.config import AUTO, option


@dataclass(frozen=True)
class QuantizerConfig:
    mode: Literal["lsq"] = option("lsq", help="The quantizer; there is LSQ only.")
    bit: int | None = option(
        None, low=2, high=8, help="Read from LIMPQ's files and without effect: target_bits, or a policy, says the bit-widths.")
    per_channel: bool = option(
        False, help="Weights: one step size per output channel, not one per layer; activations have one per layer.")
    symmetric: bool = option(False, help="Leave out the lowest integer of a signed quantization range.")
    all_positive: bool = option(
        False, help="Whether the quantization range is unsigned; weights are always signed, so false is the only value.")
    init: Literal["lsq", "three_sigma"] = option(
        "lsq", help="Initial step sizes of weights: LSQ's from the mean magnitude, or LIMPQ's from mean and standard "
                    "deviation; activations start from their first batch.")


@dataclass(frozen=True)
class ActQuantizerConfig(QuantizerConfig):
    all_positive: Literal["auto"] | bool = option(
        AUTO, help="Whether inputs have an unsigned quantization range; auto: those not negative in the first training batch.")


@dataclass(frozen=True)
class ExceptedQuantizerConfig:
    bit: int | None = option(
        None, low=2, high=8, help="Bit-width of this layer; blank: not quantized in stage 1, 8 bits in stage 3, where the "
                                  "input of the first convolution stays as it is.")
    all_positive: Literal["auto"] | bool | None = option(
        None, help="As in quan.act, for this layer; blank: what quan.act says. Weights are always signed.")


@dataclass(frozen=True)
class ExceptionConfig:
    act: ExceptedQuantizerConfig = option(ExceptedQuantizerConfig(), help="The input of the layer.")
    weight: ExceptedQuantizerConfig = option(ExceptedQuantizerConfig(), help="The weight of the layer.")


@dataclass(frozen=True)
class QuanConfig:
    act: ActQuantizerConfig = option(ActQuantizerConfig(), help="Quantizers of activations, the inputs of the layers.")
    weight: QuantizerConfig = option(QuantizerConfig(), help="Quantizers of weights.")
    excepts: Literal["auto", "none"] | dict[str, ExceptionConfig] = option(
        AUTO, help="Layers and BatchNorms, by name, that have fixed bit-widths; auto: the first convolution, its BatchNorm "
                   "and the classifier; none: the empty section.")

    def __post_init__(self):
        if self.excepts == "none":
            object.__setattr__(self, "excepts", {})
