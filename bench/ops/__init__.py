"""Op benchmarks: a backend beside the plain ways of doing the same, at one model's shapes."""
