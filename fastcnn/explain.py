"""What runs a model: a row for each call of a layer, with the backend that ran it and why."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn import backends, native
from fastcnn.benchmark import peaks, work

# Allocations and metadata: nothing that a kernel computes.
_NOT_WORK = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "as_strided_",
    "_local_scalar_dense",
}  # fmt: skip
# torch's arithmetic on vectors (a BatchNorm's scale, a running mean) is one row if it moves less than this.
_MINOR_BYTES = 1 << 16
_MINOR = "arithmetic on vectors"


@dataclass(frozen=True)
class Row:
    """One call: where in the model, what, on which backend, why there, and what it costs at least."""

    layer: str
    op: str
    shapes: str
    dtype: str
    backend: str
    why: str
    operations: float
    bytes: float
    floor: float
    calls: int = 1


@dataclass(frozen=True)
class Explanation:
    """The calls of one run in their order."""

    rows: list[Row] = field(default_factory=list)

    def kernels(self) -> Counter[tuple[str, str]]:
        """How many calls of each op each backend ran: {(op, backend): calls}."""
        found: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            found[row.op, row.backend] += row.calls
        return found

    def as_dicts(self) -> list[dict]:
        """The rows, ready for JSON."""
        return [asdict(row) for row in self.rows]

    def __rich__(self) -> Table:
        table = Table(caption=_cpu_kernels(), caption_justify="left")
        for name in ("layer", "op", "shapes", "dtype", "backend", "why"):
            table.add_column(name, overflow="fold")
        for name in ("Mop", "MB", "floor µs"):
            table.add_column(name, justify="right")
        for r in self.rows:
            op = r.op if r.calls == 1 else f"{r.op} ({r.calls} calls)"
            cells = (r.layer, op, r.shapes, r.dtype, r.backend, r.why)
            table.add_row(*cells, *_figures(r.operations, r.bytes, r.floor))
        total = (sum(getattr(r, name) for r in self.rows) for name in ("operations", "bytes", "floor"))
        table.add_section()
        table.add_row("total", f"{sum(r.calls for r in self.rows)} calls", "", "", "", "", *_figures(*total))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=180).print(self)
        return text.getvalue()


def _figures(operations: float, size: float, floor: float) -> tuple[str, str, str]:
    return f"{operations / 1e6:.2f}", f"{size / 1e6:.3f}", f"{floor * 1e6:.1f}"


def _cpu_kernels() -> str:
    module = native.module()
    return f"CPU kernels: {module.isa_active()}" if module else "CPU kernels: not built"


def _dims(t: object) -> str:
    return "×".join(map(str, t.shape))


def _first_tensor(value: object) -> Tensor | None:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return next((v for v in values if isinstance(v, Tensor)), None)


def _why(primitive: str, args: Sequence, backend: str) -> str:
    """The reasons of the backends that come before the one that ran."""
    refusals = []
    for candidate, reason in backends.candidates(primitive, args):
        if candidate == backend:
            break
        refusals.append(f"{candidate}: {reason or 'leaves an empty tensor to the reference'}")
    return "; ".join(refusals)


class _Recorder(TorchDispatchMode):
    """Sees fastcnn's primitives through backends.observe and everything else through torch's dispatcher."""

    def __init__(self, owners: dict[int, str]):
        super().__init__()
        self.rows: list[Row] = []
        self.stack: list[str] = []
        self._owners, self._inside = owners, 0

    def observer(self, primitive: str, args: Sequence, backend: str, function: Callable) -> object:
        """Runs and records a primitive; the torch ops within it are its own affair."""
        self._inside += 1
        try:
            output = function(*args)
        finally:
            self._inside -= 1
        arguments = work.named(primitive, args)
        weights = [_dims(v) for name, v in arguments.items() if name.endswith("weight") and v is not None]
        into = primitive.endswith("_into")
        source = _dims(args[1 if into else 0])
        shapes = f"{source} * {' * '.join(weights)}" if weights else source
        # What works in place reads and writes its first argument: as much as with an output of its own.
        inplace = torch.empty_like(args[0], device="meta") if output is None else output
        made = [args[0], output] if into else inplace
        self._add(
            primitive, shapes, args, made, backend, _why(primitive, args, backend),
            work.primitive_operations(primitive, args, made),
        )  # fmt: skip
        return output

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._inside and func.namespace != "fastcnn" and self._is_work(func, output):
            operations = work.torch_operations(func, args, kwargs, output)
            name = _MINOR if self._is_minor(args, output) else f"aten.{func.overloadpacket.__name__}"
            source = _first_tensor(args)
            shapes = "" if source is None else _dims(source)
            self._add(name, shapes, args, output, "torch", "not an op of fastcnn", operations)
        return output

    @staticmethod
    def _is_minor(args: Sequence, output: object) -> bool:
        small = work.traffic(args, output) < _MINOR_BYTES
        return small and all(t.dim() < 2 or (t.dim() == 2 and t.shape[0] <= 4) for t in work.tensors([*args, output]))

    @staticmethod
    def _is_work(func: torch._ops.OpOverload, output: object) -> bool:
        """Whether it computes something: views and allocations do not."""
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        return not views and func.overloadpacket.__name__ not in _NOT_WORK and _first_tensor(output) is not None

    def _add(
        self, op: str, shapes: str, args: Sequence, output: object, backend: str, why: str, operations: float
    ) -> None:
        out = next((t for t in work.tensors([output]) if t.numel()), None)
        if out is None:
            return
        source = _first_tensor(args)
        dtype = (out if source is None else source).dtype
        size = work.traffic(args, output)
        floor = peaks.floor(operations, size, _peak_dtype(dtype), (out if source is None else source).device.type)
        layer, name = self._layer(args), str(dtype).removeprefix("torch.")
        row = Row(layer, op, f"{shapes} → {_dims(out)}", name, backend, why, operations, size, floor)
        last = self.rows[-1] if self.rows else None
        if op == _MINOR and last is not None and last.op == _MINOR:
            self.rows[-1] = replace(
                last,
                operations=last.operations + operations,
                bytes=last.bytes + size,
                floor=last.floor + floor,
                calls=last.calls + 1,
            )
        else:
            self.rows.append(row)

    def _layer(self, args: Sequence) -> str:
        """The module that runs; in a backward pass the owner of a parameter among the arguments."""
        if self.stack:
            return self.stack[-1]
        owners = (self._owners.get(a.data_ptr()) for a in args if isinstance(a, Tensor))
        return next((f"{owner} (backward)" for owner in owners if owner), "(no layer)")


def _peak_dtype(dtype: torch.dtype) -> torch.dtype:
    """Integers and booleans move through the same units as float32."""
    return dtype if dtype.is_floating_point else torch.float32


@contextlib.contextmanager
def _names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Within the block the stack holds the names of the modules that are running, the innermost last."""
    handles = []
    for name, module in model.named_modules():
        if getattr(module, "fused_unless_hooked", False):
            continue  # a hook would change what runs
        label = name or type(model).__name__
        handles.append(module.register_forward_pre_hook(lambda *_, label=label: stack.append(label)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(model: nn.Module) -> dict[int, str]:
    return {
        p.data_ptr(): name or type(model).__name__
        for name, module in model.named_modules()
        for p in module.parameters(recurse=False)
    }


def _measure_peaks(model: nn.Module, x: Tensor) -> None:
    """Before anything is recorded: measuring runs products of its own."""
    dtypes = {t.dtype for t in (x, *model.parameters(), *model.buffers()) if t.is_floating_point()}
    for dtype in {torch.float32, torch.bfloat16, *dtypes}:
        peaks.floor(1.0, 1.0, dtype, x.device.type)


def explain(model: nn.Module | str, x: Tensor, backward: bool = False) -> Explanation:
    """Runs a model and tells which backend ran each of its calls, why, and what each costs at least.

    A name is one of fastcnn.models', in eval mode with random weights. With ``backward`` the gradient of the
    output's sum follows, in whatever mode the model is. Floors are those of benchmark.peaks, measured here.

    Raises:
        TypeError: the model is neither a module nor a name.
        ValueError: an unknown name.
    """
    if isinstance(model, str):
        from fastcnn import models

        model = models.create_model(model).eval()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module or a model's name")
    _measure_peaks(model, x)
    if not model.training:
        with torch.no_grad():
            model(x)  # what is done once (packing weights) is no part of a call
    recorder = _Recorder(_owners(model))
    with _names(model, recorder.stack), backends.observe(recorder.observer), recorder:
        if backward:
            model(x).sum().backward()
        else:
            with torch.no_grad():
                model(x)
    return Explanation(recorder.rows)


def _model_of(args: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    import fastcnn
    from fastcnn import models

    known = models.list_models()
    if args.model not in known:
        raise ValueError(f"MODEL: got {args.model!r}, expected one of {', '.join(known)}")
    for name in ("batch", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}, expected 1 or more")
    form = models.input_format(args.model)
    size = args.size or form.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create_model(args.model).to(args.device)
        x = torch.randn(args.batch, form.channels, size, size).to(args.device)
    if args.train:
        return model.train().to(dtype), x.to(dtype)
    return fastcnn.optimize(model.eval(), dtype=dtype), x


def main(args: argparse.Namespace, console: Console) -> int:
    """``fastcnn explain``."""
    dtype = getattr(torch, args.dtype)
    model, x = _model_of(args, dtype)
    explanation = explain(model, x, backward=args.train)
    if args.json:
        print(json.dumps(explanation.as_dicts(), indent=1))
    else:
        form = "a training step of" if args.train else "the inference form of"
        console.print(f"{form} {args.model}, {args.dtype}, input {_dims(x)}", highlight=False)
        console.print(explanation)
    return 0
