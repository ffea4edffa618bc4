"""The models: their parts as the runtime sees them, and one folder for each architecture."""
