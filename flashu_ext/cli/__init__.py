"""The command line `flashu-ext`."""
