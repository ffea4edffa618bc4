"""`python -m flashu_ext` is `flashu-ext`."""

from .cli.main import main

main()
