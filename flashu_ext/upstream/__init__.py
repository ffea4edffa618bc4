"""Upstream programs' own entry points on accelerated models."""
