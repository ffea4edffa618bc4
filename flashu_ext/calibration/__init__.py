"""Scores neurons and layers per task on real images and questions."""
