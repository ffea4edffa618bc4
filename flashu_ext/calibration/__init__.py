"""Which neurons and layers each task needs: scores from real drawings and questions."""
