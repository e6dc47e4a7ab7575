"""Perplexity, KL divergence and agreement of a model that was loaded as its users load it."""
