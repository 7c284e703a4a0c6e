"""What a configuration file of this stage may say: LIMPQ's keys, and those that are new here."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

from engine.optim import check_schedule
from engine.schema import NAME, RunConfig
from util.config import option, refuse_if
from util.errors import UserError

RANDOM = "random"  # stands for a bit-width drawn for each layer


@dataclass(frozen=True)
class PruneConfig:
    """Pruning level by level."""

    method: Literal["rewinding", "iterative", "one_shot"] = option(
        "rewinding", help="rewinding: each level goes back to the early state; iterative: it goes on with the trained "
                          "weights; one_shot: one level removes all.")
    type: Literal["unstructured", "structured"] = option(
        "unstructured", help="unstructured: single weights by magnitude; structured: whole output channels by L2 norm.")
    scope: Literal["global", "layer"] = option(
        "global", help="global: all layers are compared; layer: the same share of each.")
    amount: float | list[float] = option(
        0.2, above=0, below=1, help="Share of what is left that each level removes; a list has one per level.")
    levels: int | None = option(
        None, low=1, help="Number of levels; blank with target_sparsity, or for as many as amount lists.")
    target_sparsity: float | None = option(
        None, above=0, below=1, help="The sparsity of the prunable weights, or channels, that ends the run; in place of "
                                     "levels.")
    rewind_epoch: int = option(0, low=0, help="Epoch after which the early state is kept; 0: the initial weights.")
    epochs_per_level: int | None = option(
        None, low=1, help="Epochs from the start of the schedule to the end of a level; blank: epochs.")
    excepts: list[str] | None = option(
        None, help="Layers that are not pruned; [] for none; blank: the first convolution and the classifier.")

    def __post_init__(self):
        refuse_if(self.amount == [], "amount: found an empty list, expected one share per level")
        refuse_if(self.levels is not None and self.target_sparsity is not None,
                  "target_sparsity: levels says where to stop already; give one of the two")
        if isinstance(self.amount, list) and (self.levels or 0) > len(self.amount):
            raise UserError(f"amount: found {len(self.amount)} shares for {self.levels} levels")

    @property
    def last_level(self):
        """The number of the last level, None where a target sparsity ends the run."""
        if self.target_sparsity is not None or self.method == "one_shot":
            return None
        return len(self.amount) if self.levels is None else self.levels

    @property
    def target(self):
        """The share to remove in all, None where a number of levels ends the run; exact where it comes from amounts."""
        if self.target_sparsity is not None:
            return Fraction(str(self.target_sparsity))
        if self.method != "one_shot":
            return None
        amounts = self.amount[:self.levels] if isinstance(self.amount, list) else [self.amount] * self.levels
        return 1 - math.prod(1 - Fraction(str(amount)) for amount in amounts)

    def amount_of(self, level):
        """The share of what is left that a level (the first is 1) removes."""
        if self.method == "one_shot":
            return 1
        if not isinstance(self.amount, list):
            return self.amount
        if level > len(self.amount):
            raise UserError(f"prune.amount: its {len(self.amount)} levels end below target_sparsity "
                            f"({self.target_sparsity:g}); give more, or one number for all levels")
        return self.amount[level - 1]


@dataclass(frozen=True)
class IndicatorsConfig(RunConfig):
    """Joint training of all candidate bit-widths. New keys: in_place_distillation, random_pass, init_from, prune."""

    LIMPQ_TEMPLATE: ClassVar = {"epochs": 3, "smoothing": 0.1, "weight_decay": 2.5e-5, "min_lr": 1e-5}

    name: str = option("indicators", help=NAME)
    in_place_distillation: bool = option(
        False, help="The narrower candidates learn from the outputs of the highest bit-width instead of from the labels.")
    random_pass: bool = option(
        True, help="Each step also has a pass with a bit-width drawn for each layer; without, target_bits: [4] is plain "
                   "training at 4 bits.")
    init_from: str | None = option(
        None, help="A full-precision checkpoint, with or without pruning masks, whose weights this run starts from.")
    prune: PruneConfig = option(PruneConfig(), help="Pruning level by level; read by pruning.py only.")

    def __post_init__(self):
        super().__post_init__()
        check_schedule(self)
        refuse_if(self.fp_model, "fp_model: full-precision networks are trained in quantization_training")
        refuse_if(self.init_from and self.pre_trained,
                  "init_from: weights come from pre_trained already; give one of the two")

    def idle(self):
        later = dict.fromkeys(("weight_bits", "act_bits"), "quantization_training reads it")
        return {**super().idle(), **later, "prune": "pruning.py reads it"}

    @property
    def passes(self):
        """What the passes of a joint step are computed at: each candidate, then RANDOM where there is that pass."""
        return [*self.target_bits, *([RANDOM] if self.random_pass else [])]


@dataclass(frozen=True)
class PruningConfig(IndicatorsConfig):
    """The same keys, as pruning.py reads them, which LIMPQ does not have."""

    LIMPQ_TEMPLATE: ClassVar = {}

    def __post_init__(self):
        super().__post_init__()
        prune = self.prune
        refuse_if(prune.levels is None and prune.target_sparsity is None and not isinstance(prune.amount, list),
                  "prune.levels: missing; give levels or target_sparsity")
        refuse_if(prune.rewind_epoch >= self.epochs_of_level,
                  f"prune.rewind_epoch: found {prune.rewind_epoch}, which is never reached before the end of a level; allowed "
                  f"is less than {self.epochs_of_level}")
        refuse_if(self.eval, "eval: pruning.py evaluates each level when it is trained; quantization_training evaluates its "
                             "checkpoint (fp_model: true, eval: true, resume.path)")
        refuse_if(self.resume.path != "auto" or self.resume.lean,
                  "resume.path: pruning.py finds its levels itself; leave it auto, and name a start in init_from or "
                  "pre_trained")
        refuse_if(not self.final_test, "final_test: pruning.py evaluates each level when it is trained; leave it true")
        refuse_if(self.freeze_weights, "freeze_weights: pruning.py trains the weights; leave it false")

    def idle(self):
        keys = ("target_bits", "quan", "in_place_distillation", "random_pass")
        idle = {**super().idle(), **dict.fromkeys(keys, "main.py reads it")}
        del idle["prune"]
        if self.prune.method == "one_shot" and self.prune.target_sparsity is not None:
            idle["prune.amount"] = "one_shot goes to target_sparsity at once"
        return {key: why for key, why in idle.items() if not key.startswith("quan.")}

    @property
    def epochs_of_level(self):
        return self.prune.epochs_per_level or self.epochs

    def for_levels(self):
        """The configuration of a level's training: its number of epochs, and a run folder of its own."""
        prune = replace(self.prune, epochs_per_level=self.epochs_of_level)
        return replace(self, name=f"{self.name}_pruning", epochs=self.epochs_of_level, prune=prune)
