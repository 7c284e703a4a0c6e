"""The search of search.py from a YAML file: python main.py CONFIG.yaml [MORE.yaml ...] [key=value ...]."""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

from options import SearchConfig
from runner import run
from util.command import Parser, add_configuration, split_configuration
from util.config import load_config


def main(arguments=None):
    parser = Parser(description=__doc__)
    add_configuration(parser)
    configs, overrides = split_configuration(parser.parse_intermixed_args(arguments).words)
    run(load_config(SearchConfig, configs, overrides), configs)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
