"""The README's Python examples run, in their order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
# ```python is run; any further word after it (```python no-run) says why it is not.
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WEIGHTS = re.compile(r'create_model\("(\w+)", weights="([^"/]+\.safetensors)"\)')


def _write_weights(text: str) -> None:
    """The files of weights that the examples name, with random weights in them."""
    for name, path in WEIGHTS.findall(text):
        safetensors = pytest.importorskip("safetensors.torch")
        from fastcnn import models

        state = models.create_model(name).state_dict()
        safetensors.save_file({k: v.contiguous() for k, v in state.items()}, path)


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text()
    blocks = BLOCK.findall(text)
    assert blocks
    monkeypatch.chdir(tmp_path)
    _write_weights(text)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
