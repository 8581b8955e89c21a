"""State-space bases: the engine against transformers' Mamba2, decode and prompts apart."""
