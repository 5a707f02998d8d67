"""What nvcc makes of the kernels: no spills, no stack, shared memory in bounds. Needs nvcc, no GPU."""

from __future__ import annotations

import pytest

from tests.cuda.toolchain import compile_cubin, kernels, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")

# The three element types of the separable kernel are one source; one of them is compiled by default.
_REPEATED = ("separable_fwd_f16.cu", "separable_fwd_f32.cu")
_QUICK = [
    pytest.param(source, "sm_90a", marks=[pytest.mark.slow] if source.name in _REPEATED else []) for source in kernels()
]
_OLDER = [pytest.param(source, "sm_80", marks=pytest.mark.slow) for source in kernels()]


@pytest.mark.parametrize(("source", "arch"), [*_QUICK, *_OLDER], ids=lambda v: getattr(v, "stem", v))
def test_kernels_keep_to_registers_and_shared_memory(source, arch, tmp_path):
    reports = compile_cubin(source, arch, tmp_path / "kernel.cubin")
    assert reports, f"ptxas reported no kernel in {source.name}"
    for report in reports:
        assert report.spill_bytes == 0, report
        assert report.stack_bytes == 0, report
        # Dynamic shared memory is planned within the device's limit (test_on_cpu.py); nothing static comes on top.
        assert report.static_shared_bytes == 0, report
        assert report.registers <= 255, report
