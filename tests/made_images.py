"""Images made for tests of the crops: noise, and what has a photograph's spectrum, also as JPEG files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PUBLISHED: dict[str, Any] = {
    "global_size": 112,
    "global_scale": (0.32, 1.0),
    "local_size": 56,
    "local_scale": (0.05, 0.32),
    "n_local": 8,
    "blur": "paper",
}


def noise(height: int = 96, width: int = 96, seed: int = 0) -> NDArray[np.uint8]:
    """Every value of every pixel as likely: the hardest case, and no image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def natural(height: int = 96, width: int = 96, seed: int = 0) -> NDArray[np.uint8]:
    """Noise whose power falls with the square of the frequency, as in photographs, with channels that go together."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) + 1 / max(height, width)
    fields = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency).real for _ in range(4)]
    channels = np.stack([fields[3] + 0.4 * field for field in fields[:3]], axis=-1)
    channels = (channels - channels.mean()) / channels.std()
    return (128 + 60 * channels).clip(0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
