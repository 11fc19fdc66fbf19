"""Losses on embeddings. Start with `reference` (the equations), then `histogram` (the module to import)."""
