"""Reads weights from a path or a URL and puts them into a model, or says what is wrong with which file and key."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
NESTED = ("state_dict", "model")  # where training scripts put the weights in a checkpoint

_HASH = re.compile(r"-([a-f0-9]{8,})\.")  # as torch.hub names files: name-<start of its sha256>.pth


def _is_url(source: str) -> bool:
    return urlparse(source).scheme in ("http", "https", "file")


def _suffix(source: str) -> str:
    suffix = Path(urlparse(source).path if _is_url(source) else source).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"weights: got {source!r}, expected a path or a URL that ends in {', '.join(SUFFIXES)}")
    return suffix


def _cached(url: str) -> Path:
    """Where torch.hub keeps a URL's file; downloaded if it is not there yet.

    A name without a hash ("model.safetensors") gets one of its URL, or two models would share a file.
    """
    name = os.path.basename(urlparse(url).path)
    match = _HASH.search(name)
    if match is None:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), match and match.group(1))
    return path


def _read(path: Path, suffix: str) -> object:
    if suffix in TORCH_SUFFIXES:
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"weights: {path} needs safetensors; pip install safetensors") from error
    return load_file(path)


def load(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by key, on the CPU; a checkpoint's "state_dict" or "model" is unwrapped.

    URLs go through torch.hub's cache. Files are loaded with weights_only: they cannot run code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a damaged file, or one without a state_dict in it.
        OSError: a URL that cannot be fetched.
    """
    source = os.fspath(source)
    suffix = _suffix(source)
    path = _cached(source) if _is_url(source) else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {source!r}")
    try:
        loaded = _read(path, suffix)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"weights: cannot read {str(path)!r}, damaged or not a {suffix} of tensors: {first}"
        ) from error
    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"weights: {str(path)!r} holds {type(loaded).__name__}, expected a state_dict of tensors")
    return dict(loaded)


def _listed(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:4])
    return shown if len(keys) <= 4 else f"{shown} and {len(keys) - 4} more"


def _check(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError that names the file and the keys unless the state is the model's, all of it finite."""
    expected = model.state_dict()
    # Files from before torch 0.4.1 count no batches; the count matters only to momentum=None.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    name = type(model).__name__
    if missing:
        raise ValueError(f"weights: {source!r} lacks {_listed(missing)}, which {name} has (missing key)")
    if unexpected:
        raise ValueError(f"weights: {source!r} has {_listed(unexpected)}, which {name} lacks (unexpected key)")
    for key, value in state.items():
        wanted = expected[key]
        if value.shape != wanted.shape:
            hint = "; is num_classes the file's?" if value.shape[1:] == wanted.shape[1:] else ""
            raise ValueError(
                f"weights: {source!r}: {key} has shape {list(value.shape)}, expected {list(wanted.shape)}{hint}"
            )
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            raise ValueError(f"weights: {source!r}: {key} is {value.dtype}, expected {wanted.dtype}")
        if value.is_floating_point() and not torch.isfinite(value).all():
            kind = "NaN" if torch.isnan(value).any() else "infinity"
            raise ValueError(f"weights: {source!r}: {key} contains {kind}, expected finite numbers")


def load_weights(
    model: nn.Module, source: str | os.PathLike[str], renamed: Callable[[str], str] | None = None
) -> nn.Module:
    """Puts a file's weights into a model with the same keys, in place, and returns it.

    ``renamed`` makes the model's keys of those that published files have.

    Raises:
        ValueError: a missing or unexpected key, another shape, NaN or infinity, a damaged file; names file and key.
        OSError: the file is not there or cannot be fetched.
    """
    state = load(source)
    if renamed is not None:
        state = {renamed(key): value for key, value in state.items()}
    _check(model, state, os.fspath(source))
    model.load_state_dict(state, strict=False)  # strict but for num_batches_tracked, which _check lets be absent
    return model
