"""From an adapter's directory to checked JSON, rules of keys, targeted sites and tensors. Knows no kind."""
