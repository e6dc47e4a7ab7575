"""What trains and what is frozen, the loop around it, and how the result is written."""

from pipeline.training.projected import load_projected

__all__ = ["load_projected"]
