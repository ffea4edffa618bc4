"""`python -m flashu_ext.cli` is `flashu-ext`, as `python -m flashu_ext`."""

from .main import main

main()
