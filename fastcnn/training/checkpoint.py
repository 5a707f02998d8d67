"""Checkpoints: written whole or not at all, read without running code, and checked before anything uses them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

KEYS = ("arguments", "epoch", "step", "model", "optimizer", "ema", "history")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file so that a process killed at any moment leaves the old one or the new one, both whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a loss of power
    finally:
        os.close(folder)


def save(content: Mapping[str, object], path: Path) -> None:
    """Writes tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, lambda file: torch.save(dict(content), file))


def _damage(path: Path) -> str | None:
    """What is wrong with a file of torch.save, or None. torch itself does not compare the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        return str(error)
    return f"checksum of {damaged}" if damaged else None


def load(path: Path) -> dict:
    """A run's checkpoint, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one that is no checkpoint of a run; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: no checkpoint {str(path)!r}")
    reason = _damage(path)
    if reason is None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises a dozen kinds; the file is at fault in each
            reason = " ".join(str(error).split())[:200]
    if reason is not None:
        raise ValueError(f"resume: {str(path)!r} is damaged or no checkpoint: {reason}")
    missing = [key for key in KEYS if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise ValueError(f"resume: {str(path)!r} is no training checkpoint, it lacks {', '.join(missing)}")
    return dict(content)


def check_arguments(path: Path, saved: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Raises ValueError, which names the argument, unless a run is asked for what its checkpoint was made with."""
    for name, value in given.items():
        if name not in saved or saved[name] != value:
            raise ValueError(f"{name}: got {value!r}, but the checkpoint {str(path)!r} has {saved.get(name)!r}")
