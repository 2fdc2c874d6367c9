"""Installation. Known-good versions of everything are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec((Path(__file__).parent / "dinov2_fsdp" / "__init__.py").read_text(), version)

setup(
    name="dinov2_fsdp",
    version=version["__version__"],
    description="DINOv2 pretraining that runs the same on a laptop and on a cluster",
    packages=find_packages(include=["dinov2_fsdp", "dinov2_fsdp.*"]),
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
            "scikit-learn",  # reference of the evaluations
            "transformers",  # independent implementation of the backbones, and reader of what is exported for it
            "timm",  # another one
            "ruff",
            "mypy",
        ],
    },
)
