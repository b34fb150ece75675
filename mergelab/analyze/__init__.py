"""What the task vectors of models look like before they are merged: ``python -m mergelab.analyze models=…``."""
