"""What a student calls: check, hint, use, predict, calibration, progress, export_progress."""

from .checks import calibration, check, hint, predict, progress, student_seed, use
from .portfolio import export_progress

__all__ = ["calibration", "check", "export_progress", "hint", "predict", "progress", "student_seed", "use"]
