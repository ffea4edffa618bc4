"""What the tests share: oracles, input generators, tolerances, stand-ins."""
