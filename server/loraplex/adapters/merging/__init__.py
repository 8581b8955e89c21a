"""Makes one adapter of several."""
