"""Commands under test send nothing to wandb and use few threads."""

import os

os.environ["WANDB_MODE"] = "disabled"
