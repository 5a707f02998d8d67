"""Runs this folder's comparisons in Triton's interpreter, each file in a process of its own.

The interpreter is chosen when triton is imported, and the ahead-of-time compiler needs the other choice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastcnn.triton.launch import INTERPRETED

HERE = Path(__file__).parent
FILES = sorted(p.name for p in HERE.glob("test_*.py") if p.name not in ("test_interpreter.py", "test_compile.py"))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("file", FILES)
def test_comparisons_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", str(HERE / file)]
    # The interpreter is NumPy on tiny arrays: threads would only wait for one another.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout), result.stdout
