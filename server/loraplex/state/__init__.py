"""What sequences keep between steps: pages, key/value cache, and their one memory budget."""
