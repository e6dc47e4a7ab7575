"""Tests of pipeline/upcasting."""
