"""The command line that every main.py has: configuration files, then single keys; and what --help-config prints."""

import argparse
import dataclasses
import os
import re
import textwrap
import typing

from util.config import default_of, describe_bounds, expected, load_config
from util.errors import UserError, nearest

KEY = re.compile(r"""("[^"]*"|[^"=/\\])+=""")  # how `dotted.key=value` begins
YAML_ENDINGS = (".yaml", ".yml")
LAYER = "LAYER"  # stands for the name of a layer, or BatchNorm, under quan.excepts


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a UserError; flags are spelt out in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        unknown, hint = re.match(r"unrecognized arguments: (--[\w.-]+)(?:[ =](\S+))?", message), ""
        if unknown:
            flag, value = unknown[1], unknown[2] or "VALUE"
            hint = nearest(flag, [known for action in self._actions for known in action.option_strings])
            if not hint and any(action.dest == "words" for action in self._actions):
                hint = f"; a key of the configuration is written without dashes: {flag.lstrip('-')}={value}"
        raise UserError(f"{message}{hint} (see --help)")


def add_configuration(parser):
    """Let a parser take `CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...]`."""
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml | dotted.key=value",
                        help="one or more YAML files, later ones over earlier ones; then single keys")


def split_configuration(words):
    """(paths of YAML files, "key=value" strings) of what add_configuration took.

    A path may hold "=": a word is one where there is such a file, or where it ends in .yaml and what stands before the "="
    can be no key, as in runs/lr=0.1/config.yaml.
    """
    configs = [word for word in words
               if "=" not in word or os.path.isfile(word) or (word.endswith(YAML_ENDINGS) and not KEY.match(word))]
    if not configs:
        raise UserError("a configuration file is needed, such as config_resnet50.yaml (see --help)")
    return configs, [word for word in words if word not in configs]


def read_training_command(description, schema, arguments=None):
    """(configuration, whether it is a dry run) of the command line of a training stage; schema: of its configuration."""
    parser = Parser(description=description)
    add_configuration(parser)
    parser.add_argument("--help-config", action="version", version=help_config(schema),
                        help="say which keys there are, and exit")
    parser.add_argument("--dry-run", action="store_true",
                        help="build everything, compute one batch, report sizes, write nothing")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    options = parser.parse_intermixed_args(arguments)
    return load_config(schema, *split_configuration(options.words)), options.dry_run


def help_config(schema):
    """All keys of a schema as the text that --help-config prints."""
    lines = ["Keys of a YAML file, or of dotted.key=value:", ""]
    for key, allowed, default, meaning in keys_of(schema):
        lines += [f"{key}: {allowed} (default: {default})",
                  *textwrap.wrap(meaning, 110, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join(lines)


def keys_of(section, prefix=""):
    """[(dotted key, allowed values, default, meaning)] of a schema, or of a section of its defaults."""
    hints, rows = typing.get_type_hints(section if isinstance(section, type) else type(section)), []
    for item in dataclasses.fields(section):
        value, hint, key = getattr(section, item.name, default_of(item)), hints[item.name], f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            rows += keys_of(value, f"{key}.")
            continue
        allowed = " ".join(filter(None, [expected(hint), describe_bounds(item.metadata)]))
        default = "blank" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        rows.append((key, allowed, default, item.metadata["help"]))
        for arm in (hint, *typing.get_args(hint)):
            if typing.get_origin(arm) is dict:
                rows += keys_of(typing.get_args(arm)[1], f"{key}.{LAYER}.")
    return rows
