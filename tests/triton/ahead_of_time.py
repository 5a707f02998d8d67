"""Compiles, without a GPU, exactly the kernels that the launchers would launch, and reads what the compiler made.

The launchers run on meta tensors; a launch is recorded instead of performed, and its arguments give the signature.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and bytes of stack (spills) a thread, bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int
    threads: int
    ptx: str


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block kernels are not launched; the list collects them."""
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **options):
        signature, constants = {}, {}
        for parameter, value in zip(kernel.params, args, strict=True):
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if value < 1 << 31 else "i64"
        launches.append(Launch(kernel, signature, constants, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches_of(primitive: Callable, args: tuple, folding: bool = False) -> list[Launch]:
    """The launches that a call of a primitive makes, on meta tensors; without those of fastcnn.triton.reductions."""
    with recorded() as launches:
        primitive(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    return [launch for launch in launches if folding or not launch.kernel.__module__.endswith("reductions")]


def compile_for(launch: Launch, capability: int) -> Resources:
    """Compiles a launch for sm_<capability>."""
    names = list(launch.signature)
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if launch.signature[n].startswith("*")}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared, 32 * compiled.metadata.num_warps, compiled.asm["ptx"])
