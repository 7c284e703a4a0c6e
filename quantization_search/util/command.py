"""The command line that every main.py has: configuration files, then single keys."""

import argparse
import os
import re

from util.errors import UserError

KEY = re.compile(r"""("[^"]*"|[^"=/\\])+=""")  # how `dotted.key=value` begins
YAML_ENDINGS = (".yaml", ".yml")


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a UserError; flags are spelt out in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class _Print(argparse.Action):
    """Prints a text that is made when it is asked for, and exits."""

    def __init__(self, option_strings, dest, text, help):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)
        self.text = text

    def __call__(self, parser, *_):
        print(self.text())
        parser.exit()


def add_configuration(parser):
    """Let a parser take `CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...]`."""
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml | dotted.key=value",
                        help="one or more YAML files, later ones over earlier ones; then single keys")


def split_configuration(words):
    """(paths of YAML files, "key=value" strings) of what add_configuration took.

    A path may hold "=": a word is one where there is such a file, or where it ends in .yaml and what stands before the "="
    can be no key, as in runs/lr=0.1/config.yaml.
    """
    configs = [word for word in words if is_path(word)]
    if not configs:
        raise UserError("a configuration file is needed, such as config_resnet50.yaml (see --help)")
    return configs, [word for word in words if not is_path(word)]


def is_path(word):
    """Whether a word of the command line is a file instead of a `dotted.key=value`."""
    return "=" not in word or os.path.isfile(word) or (word.endswith(YAML_ENDINGS) and not KEY.match(word))


def parse_training_arguments(description, keys, arguments=None):
    """Read the command line of a training stage.

    Args:
        keys: what --help-config prints, called without arguments.

    Returns:
        (paths of YAML files, "key=value" strings, whether it is a dry run).
    """
    parser = Parser(description=description)
    add_configuration(parser)
    parser.add_argument("--help-config", action=_Print, text=keys, help="say which keys there are, and exit")
    parser.add_argument("--dry-run", action="store_true",
                        help="build everything, compute one batch, report sizes, write nothing")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    options = parser.parse_intermixed_args(arguments)
    return *split_configuration(options.words), options.dry_run
