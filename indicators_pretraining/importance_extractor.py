"""Extract the importance indicators from a checkpoint, or from several that were trained at bit-widths of their own.

python importance_extractor.py CHECKPOINT [CHECKPOINT ...] --output FILE.pkl [--of steps|loss_share|joint_fisher]

The indicators are the learned step sizes, as LIMPQ's are, or what joint training's gradients say of each weight and input:
its share in the loss that quantization adds, or the second-order estimate of that loss (taylor.py derives both).
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

from indicators import EXTRACTED, extract_all, write
from util.command import Parser
from util.exchange import check_outputs


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="<name>_checkpoint.pth.tar or <name>_best.pth.tar of main.py")
    parser.add_argument("--output", required=True, metavar="FILE.pkl")
    parser.add_argument("--b", nargs="+", type=int, metavar="BIT",
                        help="candidates, in the order of training, of a checkpoint that does not carry them")
    parser.add_argument("--of", choices=tuple(EXTRACTED), default="steps", help="what the indicators are (default steps)")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    check_outputs([("--output", options.output, "indicators")], options.checkpoints)
    write(options.output, extract_all(options.checkpoints, options.b, options.of))


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
