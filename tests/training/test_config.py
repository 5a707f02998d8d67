"""Arguments: each wrong one is named, with what came; the command line has the dataclass's defaults."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from fastcnn import cli
from fastcnn.training import TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model", "tiny_v9", "expected one of"),
        ("data", "svhn", "mnist, cifar10, cifar100, imagefolder"),
        ("dtype", "float16", "float32, bfloat16"),
        ("epochs", 0, "an integer of at least 1"),
        ("epochs", 1.5, "an integer of at least 1"),
        ("batch", 0, "an integer of at least 1"),
        ("batch", True, "an integer of at least 1"),
        ("workers", -1, "an integer of at least 0"),
        ("limit_steps", 0, "an integer of at least 1"),
        ("image_size", 0, "an integer of at least 1"),
        ("seed", -1, "an integer of at least 0"),
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("lr", "fast", "above 0"),
        ("momentum", 1.0, "from 0 up to"),
        ("weight_decay", -1e-4, "at least 0"),
        ("label_smoothing", 1.0, "from 0 up to"),
        ("ema", 1.0, "between 0 and 1"),
        ("optimizer", "rmsprop", "one of sgd, adam"),
        ("schedule", "linear", "one of cosine, exponential"),
        ("decay", 0.0, "above 0, at most 1"),
        ("decay_steps", 0, "an integer of at least 1"),
        ("warmup_epochs", 31, "0 to 30 epochs"),
    ],
)
def test_wrong_value_is_named(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(**{"model": "tiny", name: value})
    assert str(error.value).startswith(f"{name}: got {value!r}, expected ")
    assert expected in str(error.value)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov: got True, expected a momentum above 0"):
        TrainConfig("tiny", nesterov=True, momentum=0.0)


def test_command_line_has_the_same_defaults() -> None:
    args = cli._parser().parse_args(["train", "tiny"])
    for field in fields(TrainConfig):
        if field.name != "model":
            assert getattr(args, field.name) == field.default, field.name


def _fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line on stderr of a command that must exit with 2."""
    assert cli.main(["train", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_input_is_one_line(root: Path, capsys: pytest.CaptureFixture) -> None:
    quick = ("--data", "mnist", "--no-download", "--output", root / "run", "--device", "cpu")
    here = (*quick, "--batch", 16, "--data-dir", root / "data")
    assert "model: got 'tiny_v9'" in _fails(capsys, "tiny_v9", *here)
    assert "batch: got 0" in _fails(capsys, "tiny", *here, "--batch", 0)
    assert "batch: got 65, expected at most the 64 images" in _fails(capsys, "tiny", *here, "--batch", 65)
    assert "--threads: got 0" in _fails(capsys, "tiny", *here, "--threads", 0)
    assert "train-images-idx3-ubyte" in _fails(capsys, "tiny", *quick, "--data-dir", root / "absent")
    line = _fails(capsys, "tiny", *here, "--image-size", 2)
    assert "image_size: tiny cannot take images of 2 x 2 pixels" in line
    assert "no checkpoint" in _fails(capsys, "tiny", *here, "--resume")
    assert "device: got 'abacus'" in _fails(capsys, "tiny", *here, "--device", "abacus")
    assert "expected each once" in _fails(capsys, "tiny", "tiny", *here)
    assert not (root / "run" / "last.pt").exists()
