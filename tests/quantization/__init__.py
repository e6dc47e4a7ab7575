"""Tests of what writes quantized checkpoints."""
