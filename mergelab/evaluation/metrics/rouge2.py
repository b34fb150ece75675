"""ROUGE-2."""

from __future__ import annotations

from mergelab.evaluation.metrics._rouge import Rouge


class Rouge2(Rouge):
    """The mean over examples of the F1 of pairs of words, stemmed; of several references the best one counts."""

    name = "rouge2"
