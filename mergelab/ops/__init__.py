"""Tensor mathematics that methods share: task vectors, sign consensus, k-th largest, SVD, permutations."""
