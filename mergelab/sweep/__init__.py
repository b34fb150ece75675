"""Sweeps on Optuna: search spaces, samplers, studies that can be gone on with, pruning, and what is shown of them."""
