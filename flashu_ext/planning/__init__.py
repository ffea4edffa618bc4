"""What to leave out: configs, step plans, task plans, neuron layouts, and what they cost. Knows no model and no runtime."""
