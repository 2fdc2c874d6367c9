"""Random numbers as a pure function of what they are for.

Every random choice of a run (which image, which crop, which mask, which residual branch) is drawn from a
generator of its own, keyed on the seed, the purpose and the place in the run. Nothing depends on how many
numbers somebody else drew before, so neither the world size, nor the number of workers, nor a resume can
change what step ``t`` looks like.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """Return a counter-based generator for ``purpose`` at ``place`` (say, a step or a sample number).

    ``purpose`` separates uses that share a place, e.g. ``"augment"`` and ``"mask"``.
    """
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *place])
    return np.random.Generator(np.random.Philox(key))
