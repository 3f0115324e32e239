"""What a student calls: check, hint, use, predict, calibration, progress."""

from .checks import calibration, check, hint, predict, progress, student_seed, use

__all__ = ["calibration", "check", "hint", "predict", "progress", "student_seed", "use"]
