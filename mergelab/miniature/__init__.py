"""The embedded miniature: small transformers trained locally on generated text, for use without the hub."""

from mergelab.miniature.build import TASKS, MiniSet, build

__all__ = ["TASKS", "MiniSet", "build"]
