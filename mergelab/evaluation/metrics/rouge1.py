"""ROUGE-1."""

from __future__ import annotations

from mergelab.evaluation.metrics._rouge import Rouge


class Rouge1(Rouge):
    """The mean over examples of the F1 of words, stemmed; of several references the best one counts."""

    name = "rouge1"
