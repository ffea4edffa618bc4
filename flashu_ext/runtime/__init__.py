"""Runs an accelerated model: one engine for each task, swapped into the model's own instance."""
