"""Several models on the same images, in the same order, for the same budget, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastcnn.training.config import TrainConfig
from fastcnn.training.distributed import process_group
from fastcnn.training.plots import plot
from fastcnn.training.reporter import Reporter
from fastcnn.training.trainer import TrainResult, train


def comparison_folder(config: TrainConfig) -> Path:
    """Where a comparison writes."""
    return Path(config.output) if config.output is not None else Path("train-output") / f"compare-{config.data}"


def compare(models: Sequence[str], config: TrainConfig, reporter: Reporter | None = None) -> dict[str, TrainResult]:
    """Trains models one after another and draws all their curves into compare.png of the output folder.

    Each has a folder of its own in there, with what `train` writes. With `resume` a comparison goes on where it was
    interrupted: finished models are taken from their checkpoints.

    Args:
        models: names from `fastcnn.models.list_models()`.
        config: everything else; its model is ignored.
        reporter: hears of each run.

    Raises:
        ValueError: a model twice, a path as `resume`; else as `train`.
    """
    if len(set(models)) != len(models):
        raise ValueError(f"models: got {', '.join(models)}, expected each once")
    if config.resume not in (True, False):
        raise ValueError(f"resume: got {str(config.resume)!r}, expected no path when models are compared")
    folder = comparison_folder(config)
    runs = [replace(config, model=model, output=folder / model) for model in models]
    results: dict[str, TrainResult] = {}
    # One group for all runs: processes that leave and join again may not meet.
    with process_group(config.device) as group:
        for run in runs:
            begun = (run.folder / "last.pt").exists()
            group.barrier()  # before the first process writes what the others look for
            results[run.model] = train(replace(run, resume=bool(config.resume) and begun), reporter)
            if group.is_main:
                plot({name: result.history for name, result in results.items()}, folder / "compare.png")
    return results
