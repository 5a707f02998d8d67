"""Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in plain torch: the masks' oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS, _WORD = 10, (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """The four words of Philox-4x32-10 for four words of counter and two of key; int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    for step in range(_ROUNDS):
        # Products wrap around in 64 bits: their bits are right, only their sign may not be.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        k0, k1 = ((k + step * d) & _WORD for k, d in zip(key, _KEY_STEPS, strict=True))
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
    return [c0, c1, c2, c3]


def draws(index: Tensor, seed: Tensor) -> Tensor:
    """The draws of these indices as int64 in [0, 2^32); seed [2] holds the key and the offset."""
    key, offset = ([v & _WORD, v >> 32 & _WORD] for v in seed)
    group = index >> 2
    words = philox([group & _WORD, group >> 32, *(v.expand_as(group) for v in offset)], key)
    return torch.stack(words).gather(0, (index & 3).unsqueeze(0)).squeeze(0)
