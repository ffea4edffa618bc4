"""The models: their parts as the runtime uses them, and one folder for each architecture."""
