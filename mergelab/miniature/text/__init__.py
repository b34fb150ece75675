"""The text miniatures: tiny language models of laws and recipes, and tiny summarisers, trained locally."""

from mergelab.miniature.text.build import TextSet, build
from mergelab.miniature.text.recipe import SETS, kind_of

__all__ = ["SETS", "TextSet", "build", "kind_of"]
