"""Bytes and launches of a decode step's adapter work, counted for several designs, and the times that follow."""
