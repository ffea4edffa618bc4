"""One file per command of `flashu-ext bench`; the library itself imports none of it."""
