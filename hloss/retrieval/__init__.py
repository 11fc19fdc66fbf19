"""Retrieval with embeddings: exact `ranks`, evaluation `protocols`, nearest `neighbors`."""
