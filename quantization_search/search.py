"""Find the bit-widths of every layer: least importance cost under budgets on size, BitOPs, memory and time.

python search.py --model resnet50 --i FILE.pkl --b 6 5 4 3 2 --wb 3 --ab 4 --cr 12.2 --bops True --output policy.yaml
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

from options import flags_for_keys, parse_arguments
from runner import run


def main(arguments=None):
    with flags_for_keys():
        run(parse_arguments(__doc__, arguments))


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
