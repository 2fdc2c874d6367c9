"""DINOv2 pretraining that runs the same on a laptop and on a cluster."""

__version__ = "0.1.0"
