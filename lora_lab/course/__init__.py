"""What a student calls: check, hint, use, predict, progress."""

from .checks import check, hint, predict, progress, use

__all__ = ["check", "hint", "predict", "progress", "use"]
