"""Op benchmarks: backends beside the plain ways of doing the same, at a model's shapes, on any device."""
