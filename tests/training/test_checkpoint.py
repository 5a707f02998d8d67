"""Checkpoint files: whole or absent, and a damaged one is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastcnn.training import checkpoint

CONTENT = dict.fromkeys(checkpoint.KEYS) | {"model": {"weight": torch.arange(1000.0)}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(CONTENT, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_what_is_saved_is_loaded(path: Path) -> None:
    loaded = checkpoint.load(path)
    assert loaded.keys() == CONTENT.keys()
    assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize("part", [0, 10, 0.5, 0.99])
def test_truncated_file_is_named(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if part < 1 else int(part)])
    with pytest.raises(ValueError, match=r"last.pt' is damaged or no checkpoint"):
        checkpoint.load(path)


def test_a_flipped_bit_of_a_weight_is_noticed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    position = content.index(torch.tensor([500.0, 501.0]).numpy().tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last.pt' is damaged or no checkpoint: checksum of"):
        checkpoint.load(path)


def test_other_files_of_torch_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in ({"model": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is no training checkpoint, it lacks"):
            checkpoint.load(path)
    torch.save(os.system, path)  # code is not loaded, let alone run
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "absent.pt")
