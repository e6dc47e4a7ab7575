"""Tests of pipeline.upcasting."""
