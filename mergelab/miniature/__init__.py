"""The embedded miniature: small transformers, really trained here on generated text, for when there is no hub."""

from mergelab.miniature.build import TASKS, MiniSet, build

__all__ = ["TASKS", "MiniSet", "build"]
