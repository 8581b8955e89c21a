"""Loraplex's ops: each folder holds one op's contract, a readable reference, and its backends."""
