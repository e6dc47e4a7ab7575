"""Tests that start what users start."""
