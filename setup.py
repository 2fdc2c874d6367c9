"""Installation. Known-good versions of everything are in constraints.txt."""

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

version = {}
exec((Path(__file__).parent / "dinov2_fsdp" / "__init__.py").read_text(), version)

# Compiled code for a CPU (dinov2_fsdp/native), once for each instruction set; an installation picks one when it runs.
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "cd")), "-mprefer-vector-width=512"]
# What has bf16 has these too, but for Intel's Cooper Lake, which takes the one before.
_AVX512_VNNI = [*_AVX512, "-mavx512vbmi", "-mavx512vnni"]
_AVX512_BF16 = [*_AVX512_VNNI, "-mavx512bf16"]
_AMX = [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
_VARIANTS = {
    "_avx2": _AVX2,
    "_avx512": _AVX512,
    "_avx512_vnni": _AVX512_VNNI,
    "_avx512_bf16": _AVX512_BF16,
    "_amx": _AMX,
}
# Neither errno nor traps: functions and comparisons may become vector instructions. No result depends on it.
_OPTIONS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# GCC 12 warns of its own headers for AVX-512, thousands of times: what is wrong with a build could not be found.
_OPTIONS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def compiled():
    """Return what a compiler builds; an installation without a compiler goes on, and does the same in torch."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    native = Path(__file__).parent / "dinov2_fsdp" / "native"
    sources = sorted(path for path in native.iterdir() if path.suffix in (".cpp", ".h"))  # as native/__init__.py
    fingerprint = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return [
        Extension(
            f"dinov2_fsdp.native.{name}",
            [f"dinov2_fsdp/native/{source.name}" for source in sources if source.suffix == ".cpp"],
            define_macros=[("DINOV2_SOURCE", f'"{fingerprint}"')],
            depends=["setup.py", *(f"dinov2_fsdp/native/{source.name}" for source in sources)],
            extra_compile_args=[*_OPTIONS, *flags],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
        for name, flags in _VARIANTS.items()
    ]


setup(
    name="dinov2_fsdp",
    version=version["__version__"],
    description="DINOv2 pretraining that runs the same on a laptop and on a cluster",
    packages=find_packages(include=["dinov2_fsdp", "dinov2_fsdp.*"]),
    package_data={"dinov2_fsdp.native": ["*.cpp", "*.h"]},
    ext_modules=compiled(),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",  # FSDP2, distributed checkpoints, attention kernels
        "torchvision",  # reference of the augmentations, beside torch in every installation
        "numpy",
        "Pillow",  # decoding and the reference augmentations
        "opencv-python-headless",  # the fast augmentations; needs no display
        "omegaconf",  # typed configs, YAML, overrides
        "fvcore",  # schedules
        "safetensors",  # checkpoints and exports without pickle
        "tensorboard",
        "rich",  # live progress on a terminal
        "matplotlib",  # pictures
        "submitit",  # jobs on SLURM
    ],
    extras_require={
        "cuda": ["xformers"],  # memory-efficient attention over packed sequences; has no CPU path
        "test": [
            "pytest",
            "pytest-timeout",  # a hung rank must fail its test, not the whole run
            "pytest-xdist",  # the fast tests on every core
            "scikit-learn",  # reference of the evaluations
            "transformers",  # independent implementation of the backbones, and reader of what is exported for it
            "timm",  # another one
            "ruff",
            "mypy",
        ],
    },
)
