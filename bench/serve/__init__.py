"""The load harness: sends requests for many adapters to a running server, measures, and reports."""
