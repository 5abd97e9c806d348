"""The reference RETRO, on the fused kernels: the model, its files, its generation and its training."""

from .config import PRESETS, RetroConfig
from .generation import Generated, Neighbours
from .retro import Retro

__all__ = ["PRESETS", "Generated", "Neighbours", "Retro", "RetroConfig"]
