"""pytorch-metric-learning: its losses in runs by name (`pml`), and replacements for two of its classes."""
