"""Adapters: sources, kinds, the algebra they lower to, the registry and the device bank."""
