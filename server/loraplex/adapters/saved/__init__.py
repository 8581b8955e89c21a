"""What any kind may have beside its own: saved modules, trained tokens, an added vocabulary."""
