"""Analysis, tuning and comparison of accelerated models."""
