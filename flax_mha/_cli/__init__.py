"""The command line: what can be typed. `_commands` does it."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from flax_mha._cli import _signals
from flax_mha._cli._messages import one_line, shown

_EXAMPLES = """\
examples:
  flax-mha inspect model.pt
  flax-mha convert model.pt model_flax --num-heads 8
  flax-mha verify model.pt model_flax
  flax-mha export model_flax back.safetensors
  flax-mha diff model.pt back.safetensors

exit codes:
  0  all is well
  1  verify or diff found differences
  2  wrong usage, or a file that is missing, broken or of another kind
  130  interrupted (143: terminated)
"""
_CONVERT_EXAMPLES = """\
examples:
  flax-mha convert vit.safetensors vit_flax --num-heads 12
  flax-mha convert clip.pt clip.safetensors --num-heads 'visual.*=12' --num-heads 8
  flax-mha convert detr.pth detr_flax --num-heads 8 --prefix transformer \\
      --rename 'decoder\\.layers=blocks' --kind '.*query_embed=embedding' \\
      --ignore '.*bbox_embed.*'

Patterns are regular expressions. But for those of --rename, which replace any part of
a name, they match whole names.
"""


def program() -> None:
    """Runs the command line, and ends the process."""
    # When Orbax fails, TensorStore's threads go on, and find nobody to report to.
    sys.unraisablehook = lambda _: None
    _signals.end_at_once()
    code = 0
    try:
        code = main()
    except BaseException:  # a library may have made another error of an interrupt
        if not _signals.stopped:
            raise
    sys.exit(128 + _signals.stopped[0] if _signals.stopped else code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    for name in ("absl", "asyncio"):  # Orbax's warnings, and tasks it left behind
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"flax-mha: {shown(one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flax-mha: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    # Not before `end_at_once`: what they import takes a while.
    from flax_mha._cli import _commands, _inspect

    parser = argparse.ArgumentParser(
        prog="flax-mha",
        description="PyTorch checkpoints to Flax parameters and back.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", _inspect.inspect)
    _add_checkpoint(inspect)

    _add_convert_options(_command(commands, "convert", _commands.convert_))

    verify = _command(commands, "verify", _commands.verify)
    _add_checkpoint(verify)
    _add_converted(verify)

    export = _command(commands, "export", _commands.export)
    _add_converted(export)
    export.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="to write: a file if it ends in .safetensors, else a folder of such files",
    )
    export.add_argument(
        "--all-biases",
        action="store_true",
        help="also write biases that PyTorch's layers lacked, and training changed",
    )
    _add_overwrite(export)

    diff = _command(commands, "diff", _commands.diff)
    for name in ("a", "b"):
        diff.add_argument(
            name, type=Path, metavar=name.upper(), help="of PyTorch's, or converted"
        )
    return parser


def _command(commands, name: str, run) -> argparse.ArgumentParser:
    first_line = run.__doc__.splitlines()[0]
    command = commands.add_parser(
        name,
        help=first_line,
        description=run.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_convert_options(command: argparse.ArgumentParser) -> None:
    command.epilog = _CONVERT_EXAMPLES
    _add_checkpoint(command)
    command.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="to write: a file if it ends in .safetensors, else an Orbax checkpoint",
    )
    command.add_argument(
        "--num-heads",
        action="append",
        default=[],
        type=_heads_rule,
        metavar="N|PATTERN=N",
        help="heads of all attention layers, or of those that have such a name; not "
        "needed if a config.json beside the file tells",
    )
    command.add_argument(
        "--prefix", default="", help="convert only what is below this name"
    )
    for option, metavar, what in (
        ("--rename", "PATTERN=NAME", "replace in the names of modules"),
        (
            "--kind",
            "PATTERN=KIND",
            "what a module is, where its shapes do not tell: kernel, embedding, scale, "
            "weight (as it is) or attention",
        ),
    ):
        command.add_argument(
            option, action="append", default=[], type=_rule, metavar=metavar, help=what
        )
    for option, metavar, what in (
        ("--ignore", "PATTERN", "leave these names out"),
        ("--stack", "PREFIX", "stack the layers below it, for nn.scan"),
    ):
        command.add_argument(
            option, action="append", default=[], metavar=metavar, help=what
        )
    _add_overwrite(command)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file", type=Path, metavar="FILE", help="PyTorch's checkpoint, file or folder"
    )
    command.add_argument(
        "--wrapper",
        help="the entry of FILE to take, model_ema say, where it has several",
    )


def _add_converted(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, metavar="OUT", help="what convert wrote")


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overwrite", action="store_true", help="replace what is there"
    )


def _heads_rule(text: str) -> tuple[str, int]:
    pattern, equals, number = text.rpartition("=")
    if not number.isdecimal() or (equals and not pattern):
        raise argparse.ArgumentTypeError(f"{text!r} must be N or PATTERN=N")
    return pattern or ".*", int(number)


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be PATTERN=VALUE")
    return pattern, value
