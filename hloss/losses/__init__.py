"""Losses on embeddings. Read `reference` first, for the equations; import from `histogram` and `baselines`."""
