"""Tensor parallelism: the group of ranks and how tensors are cut over it."""
