"""One experiment: locate → plan → open → merge → evaluate → record → save."""
