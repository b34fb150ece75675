"""Merge methods: one file per method, named as in conf/method."""

MERGEKIT = "mergekit: Goddard et al. 2024, arXiv:2403.13257"  # source of methods that have no paper
