"""Sweeps on Optuna: plan, trials, scheduling, study, pruners, launchers."""
