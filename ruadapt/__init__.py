"""Adapt open language models to Russian: new vocabulary, embeddings, Learned Embedding Propagation."""

__version__ = "0.1.0"
