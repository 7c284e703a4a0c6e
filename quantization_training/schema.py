"""What a configuration file of this stage may say: LIMPQ's keys, and those that are new here."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.optim import check_schedule
from engine.schema import NAME, RunConfig
from util.config import option, refuse_if
from util.exchange import BITS_OF, is_bit


@dataclass(frozen=True)
class DistillationConfig:
    """Learn from a full-precision network as well."""

    teacher: str | None = option(
        None, help="The full-precision network to learn from as well: a checkpoint, or pre_trained; blank: no distillation.")
    weight: float = option(0.5, low=0, high=1, help="Weight of the distillation loss; the loss on the labels has the rest.")
    temperature: float = option(1.0, above=0, help="Temperature that the logits are divided by before the softmax.")


@dataclass(frozen=True)
class GradualPruneConfig:
    """Pruning while training goes on."""

    target_sparsity: float | None = option(
        None, above=0, below=1, help="The sparsity of the prunable weights, or channels, at the end; blank: no pruning.")
    type: Literal["unstructured", "structured"] = option(
        "unstructured", help="unstructured: single weights by magnitude; structured: whole output channels by L2 norm.")
    scope: Literal["global", "layer"] = option(
        "global", help="global: all layers are compared; layer: the same share of each.")
    start_epoch: float = option(0, low=0, help="When pruning begins, in epochs.")
    end_epoch: float | None = option(
        None, above=0, help="When the target is reached, in epochs; blank: three quarters of epochs.")
    frequency: int = option(100, low=1, help="Steps between two removals; the end of each epoch is one too.")
    excepts: list[str] | None = option(
        None, help="Layers that are not pruned; [] for none; blank: the first convolution and the classifier.")


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning at a policy's bits, or full-precision training. New keys: policy, init_from, sat, accumulation,
    calibration_images, eval_calibration, arithmetic, distillation, prune."""

    LIMPQ_TEMPLATE: ClassVar = {"epochs": 90, "smoothing": 0.1, "lr": 0.04, "weight_decay": 2.5e-5, "min_lr": 1e-5,
                                "warmup_epochs": 5, "cooldown_epochs": 5}

    name: str = option("finetune", help=NAME)
    policy: str | None = option(None, help="The policy file with the bit-widths, as search.py writes it.")
    init_from: str | None = option(
        None, help="A checkpoint of stage 1; its weights, step sizes and BatchNorms of the policy's bits are taken first.")
    sat: bool = option(True, help="Scale-adjusted training of the classifier (SAT).")
    accumulation: int = option(1, low=1, help="Batches per optimizer step.")
    calibration_images: int = option(
        6000, low=0, help="Training images that BatchNorm is re-estimated on before each validation; 0: not at all.")
    eval_calibration: bool = option(False, help="Re-estimate BatchNorm before eval: true as well, as LIMPQ does.")
    arithmetic: Literal["auto", "integer", "float"] = option(
        "auto", help="How eval: true computes a packed file on a CPU: auto, integers where a layer fits and float elsewhere; "
                     "integer, which refuses where no layer fits; float, the checkpoint's values bit for bit.")
    distillation: DistillationConfig = option(DistillationConfig(), help="Learn from a full-precision network too.")
    prune: GradualPruneConfig = option(GradualPruneConfig(), help="Pruning while fine-tuning goes on, on a cubic schedule.")

    def __post_init__(self):
        super().__post_init__()
        check_schedule(self)
        if self.prune.target_sparsity is not None:
            self._check_pruning()
        typed = [key for key in ("weight_bits", "act_bits") if getattr(self, key) is not None]
        refuse_if(self.policy and typed, f"{''.join(typed[:1])}: the bits come from policy already; give one of the two")
        refuse_if(not self.fp_model and not self.policy and not self.eval and len(typed) < 2,
                  "policy: a policy file, or weight_bits and act_bits, are needed; or fp_model: true")
        refuse_if(self.eval and self.eval_calibration and not self.calibration_images,
                  "eval_calibration: calibration_images is 0; give the number of training images, such as 6000")
        refuse_if(self.init_from and self.pre_trained,
                  "init_from: weights come from pre_trained already; give one of the two")
        refuse_if(self.init_from and self.fp_model,
                  "init_from: takes step sizes, which fp_model does not have; use pre_trained")
        for key in typed:
            bits = getattr(self, key)
            for bit in bits if isinstance(bits, list) else [bits]:
                refuse_if(not is_bit(key, bit), f"{key}: found {bit}, expected {BITS_OF[key]}")

    def idle(self):
        idle = {**super().idle(), **({} if self.init_from else {"target_bits": "indicators_pretraining reads it"})}
        if self.fp_model:
            idle = {key: why for key, why in idle.items() if not key.startswith("quan.")}
            keys = ("quan", "policy", "weight_bits", "act_bits", "sat", "calibration_images")
            idle.update(dict.fromkeys(keys, "fp_model: true"))
        if not self.eval:
            idle["arithmetic"] = "eval: false"
        if self.distillation.teacher is None:
            idle.update(dict.fromkeys(("distillation.weight", "distillation.temperature"), "no distillation.teacher"))
        if self.prune.target_sparsity is None:
            idle["prune"] = "no prune.target_sparsity"
        return idle

    def _check_pruning(self):
        start, end = self.prune.start_epoch, self.prune_until
        refuse_if(end > self.last_epoch,
                  f"prune.end_epoch: found {end:g}, allowed is at most the {self.last_epoch} epochs of the run")
        refuse_if(start >= end, f"prune.start_epoch: found {start:g}, allowed is less than end_epoch ({end:g})")
        refuse_if(self.freeze_weights,
                  "freeze_weights: weights that do not change are not worth ranking; leave it false with prune")

    @property
    def prune_until(self):
        """The end, in epochs, of gradual pruning."""
        return 0.75 * self.epochs if self.prune.end_epoch is None else self.prune.end_epoch
