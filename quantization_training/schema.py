"""What a configuration file of this stage may say: LIMPQ's keys, and those that are new here."""

from dataclasses import dataclass

from util.config import RunConfig, bounded
from util.errors import UserError
from util.optim import check_schedule


@dataclass(frozen=True)
class DistillationConfig:
    """Learn from a full-precision network as well: teacher is a path to its checkpoint, or pre_trained."""

    teacher: str | None = None
    weight: float = bounded(0.5, low=0, high=1)
    temperature: float = bounded(1.0, above=0)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning at a policy's bits, or full-precision training. New keys: policy, init_from, sat, accumulation,
    calibration_images, distillation."""

    name: str = "finetune"
    policy: str | None = None
    init_from: str | None = None
    sat: bool = True
    accumulation: int = bounded(1, low=1)
    calibration_images: int = bounded(6000, low=0)
    distillation: DistillationConfig = DistillationConfig()

    def __post_init__(self):
        super().__post_init__()
        check_schedule(self)
        typed = [key for key in ("weight_bits", "act_bits") if getattr(self, key) is not None]
        if self.policy and typed:
            raise UserError(f"{typed[0]}: the bits come from policy already; give one of the two")
        if not self.fp_model and not self.policy and not self.eval and len(typed) < 2:
            raise UserError("policy: a policy file, or weight_bits and act_bits, are needed; or fp_model: true")
        if self.init_from and self.pre_trained:
            raise UserError("init_from: weights come from pre_trained already; give one of the two")
        if self.init_from and self.fp_model:
            raise UserError("init_from: takes step sizes, which fp_model does not have; use pre_trained")
        for key in typed:
            bits = getattr(self, key)
            for bit in bits if isinstance(bits, list) else [bits]:
                if not 2 <= bit <= 8:
                    raise UserError(f"{key}: found {bit}, expected bit-widths from 2 to 8")
