"""Retrieval on embeddings: `ranks`, evaluation `protocols`, nearest `neighbors`."""
