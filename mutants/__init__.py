"""Faults that are planted one at a time, and the tests that must notice each of them: `python -m mutants --help`."""
