"""No kernel reads past its operands: each one ends where a page without access begins."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from fastcnn import native

SCRIPT = """
import ctypes, itertools, mmap
import torch
from fastcnn import backends

libc, pages = ctypes.CDLL(None, use_errno=True), []

def guarded(t):
    size = t.numel() * t.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, no_access) == 0
    pages.append(memory)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=whole - size)
    out = flat.as_strided(t.shape, t.contiguous(memory_format=torch.channels_last).stride())
    return out.copy_(t)

def nhwc(*shape, dtype):
    return guarded(torch.randn(shape).to(dtype))

ops, head, tail = torch.ops.fastcnn, (None, None, 0), (None, None, 0, None)
with backends.force("cpu"):
    for dtype, n, c, (h, w) in itertools.product(
        (torch.float32, torch.bfloat16), (1, 2), (1, 2, 3, 9, 17), ((1, 1), (1, 2), (3, 2), (5, 7))
    ):
        x, grad = nhwc(n, c, h, w, dtype=dtype), nhwc(n, c, h, w, dtype=dtype)
        where = ((1, 1), (1, 1), (1, 1))
        up, source = (grad, None, None, None, 0, None), (x, None, None, 0, None)
        depthwise, pointwise = nhwc(c, 1, 3, 3, dtype=dtype), nhwc(c, c, 1, 1, dtype=dtype)
        general = nhwc(c, c, 3, 3, dtype=dtype)
        needs = (True, True, True)
        ops.depthwise_fwd(x, depthwise, *head, *tail, *where, False)
        ops.depthwise_bwd(*up, *source, depthwise, *where, *needs)
        ops.pointwise_fwd(x, pointwise, *head, *tail, (1, 1), True)
        ops.pointwise_bwd(*up, *source, pointwise, x, (1, 1), *needs)
        ops.conv2d_fwd(x, general, *head, *tail, *where, 1, True)
        ops.conv2d_bwd(*up, *source, general, x, *where, 1, *needs)
        ops.separable_fwd(x, depthwise, pointwise, *head, *head, *tail, *where, False)
        ops.affine_act_fwd(x, None, None, 1, grad)
        ops.residual_act_bwd(grad, x, 1, x, None, True)
        ops.channel_statistics(x)
"""


@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
@pytest.mark.parametrize("isa", native.module().isa_available() if native.module() else [])
def test_operands_that_end_with_readable_memory(isa: str):
    code = f"import os; os.environ['FASTCNN_ISA'] = {isa!r}\n{textwrap.dedent(SCRIPT)}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode != -signal.SIGSEGV, "a kernel read past an operand"
    assert run.returncode == 0, run.stderr
