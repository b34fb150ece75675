"""Generate legal text: sections of a constitution, sections and definitions of acts, and short judgments."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from mergelab.miniature.lexicon import article
from mergelab.miniature.text.phrases import fill_template


@dataclass(frozen=True)
class _Field:
    """The subject of one act, which all of its provisions share."""

    act: str
    minister: str
    permit: str
    place: str
    officer: str
    conduct: str
    meaning: str


_FIELDS = (
    _Field("Fisheries", "Fisheries", "fishing licence", "fishery", "fisheries officer", "take fish",
           "a place for fish"),
    _Field("Mining", "Resources", "mining lease", "mine", "mines inspector", "remove minerals",
           "a place for minerals"),
    _Field("Aviation", "Transport", "pilot licence", "aerodrome", "aviation inspector", "operate an aircraft",
           "a place for aircraft"),
    _Field("Water", "Water", "water permit", "watercourse", "water officer", "take water",
           "a river, creek or lake"),
    _Field("Customs", "Trade", "import permit", "port", "customs officer", "import goods",
           "a place for ships"),
    _Field("Education", "Education", "teaching certificate", "school", "registrar", "teach a class",
           "a place for education"),
    _Field("Land", "Lands", "land title", "parcel", "surveyor", "occupy land",
           "an area of land with one title"),
    _Field("Health", "Health", "medical licence", "hospital", "medical officer", "supply medicines",
           "a place for the sick"),
)  # fmt: skip
_YEARS = ("1914", "1958", "1973", "1988", "1991", "1994", "2003", "2011")
POWERS = (
    "taxation",
    "trade and commerce with other countries",
    "postal services",
    "the naval and military defence of the Commonwealth",
    "lighthouses and beacons",
    "quarantine",
    "currency and coinage",
    "banking",
    "insurance",
    "weights and measures",
    "copyrights and trade marks",
    "marriage",
    "immigration and emigration",
    "external affairs",
    "railways",
)
DUTIES = {
    "Parliament": (
        "have power to make laws for the peace, order and good government of the Commonwealth with respect to {power}",
        "have power to make laws with respect to {power}",
        "not make any law for establishing any religion",
        "determine the seat of government of the Commonwealth",
    ),
    "Governor-General": (
        "appoint the Ministers of State for the Commonwealth",
        "[summon|dissolve] the Parliament [by proclamation|once at least in every year]",
        "assent in the name of the King to a law with respect to {power}",
    ),
    "High Court": (
        "hear and determine appeals from the Supreme Court of a State",
        "have original jurisdiction in all matters with respect to {power}",
    ),
    "Senate": (
        "be composed of senators for each State, chosen by the people of the State",
        "not amend a proposed law with respect to {power}",
    ),
    "House of Representatives": (
        "be composed of members chosen by the people of the Commonwealth",
        "choose a member to be the Speaker of the House",
    ),
}
_CONSTITUTION = (
    "A law under section {number} is, to the extent of any inconsistency with [this section|this Constitution], "
    "invalid.",
    "In this section, a reference to {power} includes a reference to {power}.",
    "Until the Parliament otherwise provides, this section extends to every [State|Territory] of the Commonwealth.",
)
_OFFENCE = (
    "Section {number} Offences\n"
    "(1) A person must not {conduct} in {a_place} [without {a_permit}|unless the person holds {a_permit}].\n"
    "Penalty: [10|20|50|100|200] penalty units[| or imprisonment for 6 months| or imprisonment for 2 years].\n"
    "(2) Subsection (1) does not apply to [{a_officer}|a person who holds {a_permit} under section {other}].\n"
)
_ENFORCEMENT = (
    "(3) The Minister for {minister} may, by notice in writing, [cancel|suspend] the {word} of a person who "
    "contravenes subsection (1).",
    "(3) {A_officer} may enter {a_place} if the {officer} [believes|suspects] on reasonable grounds that a person has "
    "contravened subsection (1).",
    "(3) An application for {a_permit} must be made in writing to the Minister for {minister} within [7|14|21|28|60] "
    "days[| and be accompanied by the prescribed fee].",
)
_MEANINGS = (
    '"{place}" means {meaning};',
    '"{officer}" means a person appointed under section {other};',
    '"{permit}" means {a_permit} granted under section {other};',
    '"Minister" means the Minister for {minister};',
    '"regulations" means the regulations made under section {other};',
)
_CHARGE = (
    "The [appellant|respondent] was [charged|convicted] under section {number} of the {act}, in that the person did "
    "{conduct} without {a_permit}. The Court held that the {officer} "
)
_HELD = {
    "allowed": "[did not have power to enter|had no reasonable grounds to enter] the {place}.",
    "dismissed": "[had power to enter|had reasonable grounds to enter] the {place} under section {other}.",
}


def _slots(rng: random.Random, field: _Field) -> dict[str, str | tuple[str, ...]]:
    """Draw the slots of one passage; powers and other section numbers are drawn at each occurrence."""
    return {
        **asdict(field),
        "act": f"{field.act} {rng.choice(('Act', 'Management Act', 'Regulation Act'))} {rng.choice(_YEARS)}",
        "a_place": article(field.place),
        "a_permit": article(field.permit),
        "a_officer": article(field.officer),
        "A_officer": article(field.officer).capitalize(),
        "word": field.permit.split()[-1],
        "number": str(rng.choice((51, rng.randint(2, 120)))),
        "other": tuple(map(str, range(2, 121))),
        "power": POWERS,
    }


def _definitions(rng: random.Random) -> str:
    chosen = [_MEANINGS[at] for at in sorted(rng.sample(range(len(_MEANINGS)), rng.choice((2, 3))))]
    lines = ["Section {number} Definitions", "In this Act, unless the contrary intention appears:", *chosen]
    return "\n".join(lines)[:-1] + "."


def text(rng: random.Random) -> str:
    """Draw a passage of legal text."""
    slots = _slots(rng, rng.choice(_FIELDS))
    kind = rng.choices(("constitution", "offence", "definitions", "judgment"), (4, 3, 2, 2))[0]
    if kind == "constitution":
        organ = rng.choice(tuple(DUTIES))
        duty = rng.choice(DUTIES[organ])
        first = "Section {number} of the [Constitution|Australian Constitution] provides that the "
        template = f"{first}{organ} shall[|, subject to this Constitution,] {duty}. {rng.choice(_CONSTITUTION)}"
    elif kind == "offence":
        template = "{act}\n" + _OFFENCE + rng.choice(_ENFORCEMENT)
    elif kind == "definitions":
        template = "{act}\n" + _definitions(rng)
    else:
        result = rng.choice(tuple(_HELD))
        template = f"{_CHARGE}{_HELD[result]} The appeal is {result} with costs."
    return fill_template(rng, template, slots)
