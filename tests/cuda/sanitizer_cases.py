"""Small cases of every CUDA kernel for compute-sanitizer: `compute-sanitizer python -m tests.cuda.sanitizer_cases`.

Each result is compared with the float64 reference as well; the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import sys

import torch

from fastcnn import cuda
from tests.cuda import capsule_cases, cases, dropout_cases
from tests.cuda.cases import Shape
from tests.cuda.shapes import DEPTHWISE, SEPARABLE, STATS

CASES = [
    *(("depthwise_fwd", shape) for shape in (*DEPTHWISE, *STATS)),
    *(("depthwise_bwd", shape) for shape in DEPTHWISE),
    *(("separable_fwd", shape) for shape in SEPARABLE),
    *((primitive, case) for primitive in ("dropout_fwd", "dropout_bwd") for case in dropout_cases.CASES),
    *((primitive, case) for primitive in capsule_cases.REFERENCES for case in capsule_cases.CASES),
]
_SUITES = {Shape: cases, dropout_cases.Case: dropout_cases, capsule_cases.Case: capsule_cases}


def run_case(primitive: str, shape: Shape | dropout_cases.Case | capsule_cases.Case) -> None:
    """Runs one case on the GPU and compares it with the reference."""
    suite = _SUITES[type(shape)]
    args = suite.arguments(primitive, shape, "cuda")
    outputs = getattr(cuda, primitive)(*args)
    torch.cuda.synchronize()
    suite.check(primitive, shape, outputs, suite.reference(primitive, args))


def main() -> int:
    """Runs every case; returns the exit status."""
    reason = cuda.unavailable()
    if reason:
        print(f"the CUDA backend cannot run here: {reason}", file=sys.stderr)
        return 1
    failed = 0
    for primitive, shape in CASES:
        try:
            run_case(primitive, shape)
        except (AssertionError, RuntimeError) as error:
            failed += 1
            print(f"{primitive} {shape}: {error}", file=sys.stderr)
    print(f"{len(CASES) - failed} of {len(CASES)} cases are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
