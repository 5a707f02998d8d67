"""The command line: ``fastcnn demo | train | bench | explain | doctor``. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from fastcnn import __version__

# What bad input, missing packages and a backend forced where it cannot run raise. Anything else is a bug: it
# keeps its traceback, and FASTCNN_TRACEBACK=1 keeps every one.
USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError)

Command = Callable[[argparse.Namespace, Console], int]


def _demo(args: argparse.Namespace, console: Console) -> int:
    from fastcnn import demo

    return demo.main(args, console)


def _train(args: argparse.Namespace, console: Console) -> int:
    from fastcnn.training import command

    return command.main(args, console)


def _bench(args: argparse.Namespace, console: Console) -> int:
    from fastcnn.benchmark import command

    return command.main(args, console)


def _explain(args: argparse.Namespace, console: Console) -> int:
    from fastcnn.explain import main

    return main(args, console)


def _doctor(args: argparse.Namespace, console: Console) -> int:
    from fastcnn import doctor

    return doctor.main(console)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="photographs (default: scikit-image's samples)")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=PATH",
        help="a .pth or .safetensors file for mobilenet_v2 or xception (default: random weights, fixed seed)",
    )  # fmt: skip
    parser.add_argument("--model", choices=("mobilenet_v2", "xception"), help="only this one (default: both)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", default="demo-output", metavar="DIR", help="where the plot goes")
    parser.add_argument("--json", metavar="FILE", help="also write the figures into this file")
    parser.add_argument("--quick", action="store_true", help="two photographs, few rounds: a smoke test")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="from list_models(); several: a comparison")
    data = ("mnist", "cifar10", "cifar100", "imagefolder")
    parser.add_argument("--data", choices=data, default="cifar10", help="the data set (default: cifar10)")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="torchvision's root, or of train/ and val/")
    parser.add_argument("--no-download", dest="download", action="store_false", help="missing data is an error")
    parser.add_argument("--output", metavar="DIR", help="checkpoints, CSV and plot (default: train-output/MODEL-DATA)")
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="PATH", help="go on from a checkpoint"
    )
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="(30)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images per step, of all processes (128)")
    parser.add_argument("--limit-steps", type=int, metavar="N", help="at most N steps per epoch: a fixed budget")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), help="(the model's: adam for capsnet, else sgd)")
    parser.add_argument("--lr", type=float, metavar="R", help="learning rate after the warm-up (sgd 0.1, adam 0.001)")
    parser.add_argument("--momentum", type=float, default=0.9, metavar="M", help="of sgd (0.9)")
    parser.add_argument("--nesterov", action="store_true")
    parser.add_argument("--weight-decay", type=float, metavar="W", help="not of biases and norms (sgd 5e-4, adam 0)")
    parser.add_argument("--schedule", choices=("cosine", "exponential"), help="(sgd cosine, adam exponential)")
    parser.add_argument("--decay", type=float, default=0.96, metavar="D", help="of an exponential schedule (0.96)")
    parser.add_argument("--decay-steps", type=int, default=2000, metavar="N", help="steps that it takes (2000)")
    parser.add_argument("--warmup-epochs", type=float, metavar="E", help="(cosine: a tenth of the run, at most 1)")
    parser.add_argument("--label-smoothing", type=float, default=0.0, metavar="P", help="(0)")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="average the weights with this decay per step")
    parser.add_argument("--sync-batchnorm", action="store_true", help="under torchrun: statistics of all processes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument(
        "--image-size", type=int, metavar="S", help="pixels along an axis (the model's, at most 32; imagefolder: 224)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="weights, order and augmentation (0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode images (2)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="PATTERN", help='a suite, part of "suite/case", or "models/*bf16*"')
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, no torch.compile: a smoke test")
    parser.add_argument("--gpu", action="store_true", help="on the GPU in bf16, against cuDNN and max-autotune")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--seconds", type=float, metavar="S", help="timed per competitor and case (1; 0.05 with --gpu)")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no case after M minutes (3.5 with --gpu)")
    parser.add_argument("--json", metavar="FILE", help="also write everything into this file")
    parser.add_argument("--output", metavar="DIR", help="where raw/ and results/ go (default: the checkout's bench/)")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name from fastcnn.models.list_models()")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--size", type=int, metavar="S", help="pixels along an axis (default: the model's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true", help="a training step instead of the inference form")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcnn", description="Classic convolutional networks, faster and smaller, in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fastcnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    table: tuple[tuple[str, Command, Callable | None, str], ...] = (
        (
            "demo",
            _demo,
            _demo_arguments,
            "photographs through MobileNet-v2 and Xception: stock torch and fastcnn",
        ),
        (
            "train",
            _train,
            _train_arguments,
            "a model on MNIST, CIFAR or a folder of images; several models: a comparison",
        ),
        ("bench", _bench, _bench_arguments, "the benchmarks"),
        ("explain", _explain, _explain_arguments, "which kernel runs each layer of a model, and why"),
        ("doctor", _doctor, None, "what was built, what this machine has, what is missing"),
    )
    for name, command, arguments, summary in table:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=command)
        if arguments:
            arguments(sub)
    return parser


def _width() -> int | None:
    """Piped tables keep their columns; a terminal knows its own width."""
    return None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 160


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 2 for bad input, 1 where a result is wrong."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args, Console(width=_width()))
    except USER_ERRORS as error:
        if os.environ.get("FASTCNN_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fastcnn {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
