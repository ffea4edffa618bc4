"""`python -m flashu_ext.cli` is `flashu-ext`."""

from .main import main

main()
