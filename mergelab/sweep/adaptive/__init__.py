"""Adaptive evaluation: a trial is measured on as many examples as its score's estimate needs."""
