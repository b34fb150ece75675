"""Generate short news about decisions and their amounts: the MRPC-shaped task.

Two sentences are equivalent when they report the same decision of the same body, with the same amount and day, in other
words or another order. They are not equivalent when one of these differs, or when one sentence reports an additional
amount.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from mergelab.miniature.lexicon import DAYS, other, sentence, verb
from mergelab.miniature.record import Document, Example

LABEL_NAMES = ("not_equivalent", "equivalent")
COLUMNS = ("sentence1", "sentence2")
DIFFERENT, EQUIVALENT = 0, 1

BODIES = ("bank", "airline", "union", "city", "court", "ministry", "company", "council", "agency", "club")
SOURCES = ("officials", "reports", "lawyers", "analysts")
# Verbs of decisions, in groups of synonyms: verdicts "of 20 million dollars", changes "by 3 percent".
VERDICTS = (("approve", "accept"), ("reject", "refuse"), ("delay", "postpone"), ("cancel",))
CHANGES = (("raise", "increase"), ("cut", "reduce"))
DECISION_OF = {word: group for group in VERDICTS + CHANGES for word in group}
_CHANGES = tuple(word for group in CHANGES for word in group)
MATTERS = ("budget", "contract", "merger", "tax", "pension", "loan", "plan", "fee")
PERCENT = tuple(str(number) for number in range(2, 10))
MILLIONS = ("10", "20", "30", "40", "50", "60", "70", "80")


@dataclass(frozen=True)
class News:
    """One decision; an empty detail is omitted from the report."""

    body: str
    decision: str
    matter: str
    amount: str = ""
    day: str = ""
    source: str = ""


def _amount(rng: random.Random, decision: str, taken: str = "") -> str:
    """Draw an amount for ``decision`` other than ``taken``."""
    if decision in _CHANGES:
        return f"by {other(rng, PERCENT, *taken.split())} percent"
    return f"of {other(rng, MILLIONS, *taken.split())} million dollars"


def _news(rng: random.Random) -> News:
    decision = rng.choice(rng.choice(VERDICTS + CHANGES))
    return News(
        body=rng.choice(BODIES),
        decision=decision,
        matter=rng.choice(MATTERS),
        amount=_amount(rng, decision) if rng.random() < 0.6 else "",
        day=rng.choice(DAYS) if rng.random() < 0.6 else "",
        source=rng.choice(SOURCES) if rng.random() < 0.4 else "",
    )


def _report(rng: random.Random, news: News) -> str:
    """Write ``news`` as a sentence, in one of the word orders of equal meaning."""
    decision = verb(rng.choice(DECISION_OF[news.decision]))
    day = f"on {news.day}" if news.day else ""
    if rng.random() < 0.3:
        matter, by = (news.matter, news.amount) if news.decision in _CHANGES else (f"{news.matter} {news.amount}", "")
        core = f"the {matter} was {decision.participle} {by} by the {news.body}"
    else:
        core = f"the {news.body} {decision.past} the {news.matter} {news.amount}"
    early = bool(day) and rng.random() < 0.4
    core = f"{day} {core}" if early else f"{core} {day}"
    if not news.source:
        return sentence(*core.split())
    if rng.random() < 0.5:
        return sentence(news.source, "said", *core.split())
    return sentence(*core.split(), ",", news.source, "said")


def _change(rng: random.Random, news: News) -> tuple[News, str]:
    """Change one detail of ``news``; return the changed news and the name of the detail."""
    kinds = ["body", "decision", "matter", "more"] + ["amount"] * 2 * bool(news.amount) + ["day"] * bool(news.day)
    kind = rng.choice(kinds)
    if kind == "body":
        return replace(news, body=other(rng, BODIES, news.body)), kind
    if kind == "decision":
        alike = CHANGES if news.decision in _CHANGES else VERDICTS
        groups = [group for group in alike if news.decision not in group]
        return replace(news, decision=rng.choice(rng.choice(groups))), kind
    if kind == "matter":
        return replace(news, matter=other(rng, MATTERS, news.matter)), kind
    if kind == "amount":
        return replace(news, amount=_amount(rng, news.decision, news.amount)), kind
    if kind == "day":
        return replace(news, day=other(rng, DAYS, news.day)), kind
    return replace(news, amount="" if news.amount else _amount(rng, news.decision)), kind


def _retell(rng: random.Random, news: News) -> News:
    """Change only irrelevant details: the source, and sometimes whether the day is named."""
    source = rng.choice(SOURCES) if rng.random() < 0.3 else news.source if rng.random() < 0.6 else ""
    return replace(news, source=source, day=news.day if rng.random() < 0.85 else "")


def example(rng: random.Random) -> Example:
    """Draw two reports and whether they are equivalent."""
    news = _news(rng)
    retold = _retell(rng, news)
    if rng.random() < 0.64:
        texts = (_report(rng, news), _report(rng, retold))
        kind = "same day" if retold.day == news.day else "no day"
        return Example(texts, EQUIVALENT, kind)
    changed, kind = _change(rng, retold)
    return Example((_report(rng, news), _report(rng, changed)), DIFFERENT, kind)


def document(rng: random.Random) -> Document:
    """Draw two reports of one decision, and an unrelated report of a similar one."""
    news = _news(rng)
    return Document(_report(rng, news), _report(rng, _retell(rng, news)), _report(rng, _change(rng, news)[0]))
