"""ROUGE-L of summaries."""

from __future__ import annotations

from mergelab.evaluation.metrics._rouge import Rouge


class RougeLsum(Rouge):
    """The mean F1 of the union of sentences' longest common subsequences, sentences being lines; else as `RougeL`."""

    name = "rougeLsum"
