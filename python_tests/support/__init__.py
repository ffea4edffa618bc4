"""Shared by the tests: oracles, input generators, tolerances, stand-ins."""
