"""Running models and scoring them: classification, generation, perplexity, metrics, bootstrap."""
