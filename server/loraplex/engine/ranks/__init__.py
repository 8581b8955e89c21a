"""Tensor parallelism in the engine: the first rank decides and tells, the others do the same share of every step."""
