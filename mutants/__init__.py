"""Mutants: faults planted one at a time, each with the tests that must fail: `python -m mutants --help`."""
