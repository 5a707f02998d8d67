"""Loads the native module `_C`, after torch, so that both share one OpenMP runtime and one set of threads."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (first: _C must bind to the libgomp that torch has loaded)


@cache
def module() -> ModuleType | None:
    """The native module, or None where the package was installed without it.

    ``FASTCNN_NATIVE_DIR`` names a directory whose ``_C`` is loaded instead (a sanitised build, for example).

    Raises:
        ImportError: the directory holds no ``_C``, or a ``_C`` that is there does not load.
    """
    override = os.environ.get("FASTCNN_NATIVE_DIR")
    directory = Path(override) if override else Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = directory / f"_C{suffix}"
        if path.exists():
            spec = importlib.util.spec_from_file_location("fastcnn._C", path)
            native = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(native)
            return native
    if override:
        raise ImportError(f"FASTCNN_NATIVE_DIR: no _C extension module in {override!r}")
    return None
