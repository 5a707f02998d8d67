"""``fastcnn train``: a model, or several to compare, on MNIST, CIFAR or a folder of images."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields

import torch
from rich.console import Console

from fastcnn.training.comparison import compare, comparison_folder
from fastcnn.training.config import TrainConfig
from fastcnn.training.reporter import ConsoleReporter, Reporter
from fastcnn.training.trainer import Interrupted, train


def _config(args: argparse.Namespace) -> TrainConfig:
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    return TrainConfig(**given | {"model": args.models[0]})


def main(args: argparse.Namespace, console: Console) -> int:
    """Trains; 130 after Ctrl-C or SIGTERM."""
    config = _config(args)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: got {args.threads}, expected 1 or more")
        torch.set_num_threads(args.threads)
    is_main = os.environ.get("RANK", "0") == "0"
    reporter: Reporter = ConsoleReporter(console)
    try:
        if len(args.models) == 1:
            train(config, reporter)
            folder, picture = config.folder, "curves.png"
        else:
            compare(args.models, config, reporter)
            folder, picture = comparison_folder(config), "compare.png"
    except Interrupted as interrupted:
        if is_main:
            console.print(str(interrupted), highlight=False, markup=False, soft_wrap=True)
        return 130
    if is_main:
        console.print(f"plot: {folder / picture}", highlight=False, markup=False, soft_wrap=True)
    return 0
