"""One command of a stage, as experiments and the demo run it: in its folder, unless what it makes is there already."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """key: what the command is called. folder: the stage's. made: the file that has to exist afterwards."""

    key: str
    folder: str
    command: tuple
    made: Path

    @property
    def is_done(self):
        return self.made.exists()

    @property
    def line(self):
        """What to type for it in the root folder."""
        return f"cd {self.folder} && python {' '.join(self.command)}"

    def start(self, root, **options):
        """The running process; options: as subprocess.Popen has them, and variables of the environment under `env`."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
        return subprocess.Popen([sys.executable, *self.command], cwd=root / self.folder, env=environment, **options)
