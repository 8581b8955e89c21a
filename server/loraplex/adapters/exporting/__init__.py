"""Adapters written out: as PEFT directories, and folded into the base as checkpoints that transformers loads."""
