"""The embedded JanusFlow and BAGEL of flashu_ext: a folder for each, which flashu_ext finds by itself."""
