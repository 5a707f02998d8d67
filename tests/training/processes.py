"""What tests start as processes of their own: a run of the tiny model, alone or under torchrun.

    python -m tests.training.processes ROOT OPTION=VALUE...

trains one of the tiny models on the data in ROOT/data and writes ROOT/rank<R>.pt: the weights, the average and the
epochs of process R.
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from fastcnn.models.registry import register
from fastcnn.training import Interrupted, train
from fastcnn.training.reporter import ConsoleReporter
from tests.training.tiny import BUILDERS, config


def main(root: Path, options: dict[str, object]) -> int:
    for builder in BUILDERS:
        register(32)(builder)
    torch.set_num_threads(1)
    try:
        result = train(config(root, **options), ConsoleReporter(Console(width=160)))
    except Interrupted as interrupted:
        print(interrupted)
        return 130
    content = {
        "model": result.model.state_dict(),
        "ema": result.ema.state_dict() if result.ema else None,
        "history": [asdict(epoch) for epoch in result.history],
    }
    torch.save(content, root / f"rank{os.environ.get('RANK', 0)}.pt")
    return 0


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[2:])
    sys.exit(main(Path(sys.argv[1]), {name: ast.literal_eval(value) for name, value in pairs}))
