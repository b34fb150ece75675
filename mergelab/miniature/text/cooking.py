"""Generate recipes: with a list of ingredients and numbered steps, or as a few sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mergelab.miniature.lexicon import article
from mergelab.miniature.text.phrases import capital, fill_template


@dataclass(frozen=True)
class _Ingredient:
    """An ingredient: its name, its amounts, its form in front of a dish's name, and its preparation."""

    name: str
    amounts: str
    before: str = ""
    prepare: str = ""


_EGGS = _Ingredient("eggs", "[2|3|4] eggs", prepare="[beat|beat|whisk] the eggs[| with a pinch of salt]")
_BUTTER = _Ingredient("butter", "[20 g|50 g|1 tablespoon] of butter")
_MILK = _Ingredient("milk", "[100 ml|200 ml|1 cup] of milk")
_FLOUR = _Ingredient("flour", "[200 g|300 g|2 cups] of flour", prepare="sift the flour into a [large|deep] bowl")
_SUGAR = _Ingredient("sugar", "[2 tablespoons|100 g] of sugar")
_SALT = _Ingredient("salt", "[a pinch|1 teaspoon] of salt")
_OIL = _Ingredient("olive oil", "[1 tablespoon|2 tablespoons] of olive oil")
_OATS = _Ingredient("oats", "[50 g|1 cup] of oats")
_STOCK = _Ingredient("stock", "[500 ml|1 litre] of stock")
_PASTA = _Ingredient("pasta", "[300 g|500 g] of pasta")
VEGETABLES = (
    _Ingredient("onions", "[1 onion|2 onions]", "onion", "[peel|chop] the onions[| finely]"),
    _Ingredient("garlic", "[1 clove|2 cloves] of garlic", "garlic", "[crush|peel] the garlic"),
    _Ingredient("mushrooms", "[100 g of|6] mushrooms", "mushroom", "[wash|wipe] and slice the mushrooms"),
    _Ingredient("tomatoes", "[400 g of|2] tomatoes", "tomato", "[dice|chop] the tomatoes"),
    _Ingredient("spinach", "[100 g|1 handful] of spinach", "spinach", "wash the spinach"),
    _Ingredient("cheese", "[50 g|100 g] of cheese", "cheese", "grate the cheese"),
    _Ingredient("carrots", "[2|3] carrots", "carrot", "peel and [slice|dice] the carrots"),
    _Ingredient("potatoes", "[500 g of|4] potatoes", "potato", "peel and [slice|dice] the potatoes"),
    _Ingredient("peppers", "[2|3] peppers", "pepper", "cut the peppers into strips"),
)
FRUITS = (
    _Ingredient("apples", "[2|3] apples", "apple", "peel and [slice|dice] the apples"),
    _Ingredient("bananas", "[2|3] bananas", "banana", "[mash|slice] the bananas"),
    _Ingredient("blueberries", "[100 g|1 cup] of blueberries", "blueberry", "wash the blueberries"),
    _Ingredient("walnuts", "[50 g|1 handful] of walnuts", "walnut", "chop the walnuts"),
    _Ingredient("pears", "[2|3] pears", "pear", "peel and [slice|dice] the pears"),
)
_DRAWN = {
    "herb": ("parsley", "basil", "chives", "thyme"),
    "minutes": ("2", "3", "5", "8", "10"),
    "baking": ("25", "30", "40", "45"),
    "heat": ("160", "180", "200", "220"),
    "side": ("toast", "a green salad", "fresh bread", "rice", "a slice of lemon"),
}


@dataclass(frozen=True)
class _Dish:
    """A kind of dish: its fixed ingredients, the choices for another one (``{it}``), its steps, and its meal."""

    name: str
    always: tuple[_Ingredient, ...]
    besides: Sequence[_Ingredient]
    steps: tuple[str, ...]
    meal: str
    counted: bool = True


_DISHES = (
    _Dish(
        "omelette", (_EGGS, _BUTTER), VEGETABLES,
        ("[melt|heat] the butter in a frying pan[| over medium heat]",
         "pour in the eggs and cook for {minutes} minutes",
         "scatter the {it} over the eggs and fold the omelette in half",
         "[sprinkle with {herb} and serve|serve] with {side}"),
        "breakfast",
    ),
    _Dish(
        "pancakes", (_FLOUR, _EGGS, _MILK), FRUITS,
        ("stir in the milk until the batter is smooth", "pour a little batter into a [hot buttered|hot] pan",
         "cook for {minutes} minutes until golden and turn over", "top with the {it} and serve [warm|at once]"),
        "breakfast", False,
    ),
    _Dish(
        "porridge", (_OATS, _MILK, _SALT), FRUITS,
        ("bring the milk to the boil in a [saucepan|small pan]", "stir in the oats and the salt",
         "simmer [gently|slowly] for {minutes} minutes", "top with the {it} and serve [hot|with honey]"),
        "breakfast", False,
    ),
    _Dish(
        "soup", (_OIL, _STOCK), VEGETABLES,
        ("heat the olive oil in a large [pot|saucepan]", "fry the {it} for {minutes} minutes, stirring often",
         "add the stock, bring to the boil and simmer for {minutes} minutes",
         "season with [salt and {herb}|{herb}] and serve with {side}"),
        "lunch",
    ),
    _Dish(
        "pasta", (_PASTA, _OIL), VEGETABLES,
        ("cook the pasta in boiling salted water for {minutes} minutes", "heat the olive oil in a frying pan",
         "fry the {it} until [soft|golden]", "drain the pasta, stir in the {it} and sprinkle with {herb}"),
        "dinner", False,
    ),
    _Dish(
        "cake", (_FLOUR, _SUGAR, _BUTTER, _EGGS), FRUITS,
        ("preheat the oven to {heat} degrees", "[mix|beat] the butter and the sugar until light and fluffy",
         "fold in the flour and the {it}", "pour into a [buttered|lined] tin and bake for {baking} minutes"),
        "tea",
    ),
    _Dish(
        "bread", (_FLOUR, _SALT, _OIL), FRUITS,
        ("add the salt, the olive oil and the {it} and mix to a soft dough", "knead the dough for {minutes} minutes",
         "cover and leave to rise in a warm place[| for 1 hour]", "bake at {heat} degrees for {baking} minutes"),
        "breakfast", False,
    ),
    _Dish(
        "casserole", (_BUTTER, _STOCK), VEGETABLES,
        ("preheat the oven to {heat} degrees", "fry the {it} in the butter until [soft|golden]",
         "cover with the stock and season with [salt and {herb}|{herb}]", "bake for {baking} minutes",
         "serve [hot with|with] {side}"),
        "dinner",
    ),
)  # fmt: skip


def text(rng: random.Random) -> str:
    """Draw a recipe."""
    dish = rng.choice(_DISHES)
    besides = rng.choice(dish.besides)
    ingredients = (*dish.always, besides)
    amounts = [fill_template(rng, ingredient.amounts) for ingredient in ingredients]
    slots = {**_DRAWN, "it": besides.name}
    prepared = [ingredient.prepare for ingredient in ingredients if ingredient.prepare]
    steps = [f"{capital(fill_template(rng, step, slots))}." for step in (*prepared, *dish.steps)]
    title = f"{besides.before} {dish.name}"
    called = article(title) if dish.counted else title
    if (kind := rng.random()) < 0.3:
        numbered = (f"{number}. {step}" for number, step in enumerate(steps, 1))
        return "\n".join([capital(title), f"Ingredients: {', '.join(amounts)}", *numbered])
    called = rng.choice((called, article(dish.name) if dish.counted else dish.name))
    needed = f"{', '.join(amounts[:-1])} and {amounts[-1]}"
    if kind < 0.5:
        opening = f"To make {called}, you need {needed}."
    elif kind < 0.7:
        first, second, *steps = steps
        opening = f"To make {called}, {first[0].lower()}{first[1:-1]} and {second[0].lower()}{second[1:]}"
    elif kind < 0.85:
        opening = f"For a healthy {dish.meal}, start with {needed}."
    else:
        opening = fill_template(rng, f"For {dish.meal} I [like|like|often make] {called}.")
    return " ".join([opening, *steps])
