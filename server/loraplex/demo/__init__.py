"""The embedded default: demo base, demo adapters, and how they were made."""
