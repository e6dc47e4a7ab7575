"""Tests of the formats, each against the library that owns it."""
