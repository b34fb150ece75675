"""Tensors on disk and in memory: reading, aligning, arithmetic and writing of model weights."""
