"""Base models: packed, variable-length definitions and checkpoint loading."""
