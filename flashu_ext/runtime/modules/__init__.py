"""Layers that replace a model's own computation: FFN, attention passes, decoder layer, head block."""
