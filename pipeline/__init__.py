"""The engine: a checkpoint goes in, a checkpoint comes out. It never imports Prefect."""

__version__ = "0.1.0"
