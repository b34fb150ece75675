"""Runs and sweeps from Python and in notebooks, as objects: ``ml.run(method="ties", task="rte")``, ``ml.sweep(…)``."""
