"""Loraplex: one base model in memory, many adapters, one batch."""

__version__ = "0.1.0"
