"""What a configuration file of this stage may say: LIMPQ's keys, and those that are new here."""

from dataclasses import dataclass

from util.config import RunConfig
from util.errors import UserError
from util.optim import check_schedule


@dataclass(frozen=True)
class IndicatorsConfig(RunConfig):
    """Joint training of all candidate bit-widths. New key: in_place_distillation."""

    name: str = "indicators"
    in_place_distillation: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_schedule(self)
        if self.fp_model:
            raise UserError("fp_model: full-precision networks are trained in quantization_training")
