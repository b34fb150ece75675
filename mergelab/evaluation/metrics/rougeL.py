"""ROUGE-L."""

from __future__ import annotations

from mergelab.evaluation.metrics._rouge import Rouge


class RougeL(Rouge):
    """The mean F1 of the longest common subsequence of stemmed words; of several references the best one counts."""

    name = "rougeL"
