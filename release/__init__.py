"""What a release is made of: the source archive, the wheels, their checks and the pages. `make release` runs all of it."""
