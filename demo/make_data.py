"""Writes the demo's fine-tuning sets and its check: data/{pirate,json}.jsonl, data/prompts.json.

    python demo/make_data.py

Both sets ask the same sort of short question and teach very different answers. The prompts of
the check use names and sentence patterns that no example has.
"""

import json
import pathlib
import random

FOLDER = pathlib.Path(__file__).parent / "data"
SEED = 7
EXAMPLES = 144  # a multiple of topics × operations, so both sets are balanced

NAMES = (
    "Ana Ben Carl Dina Emma Frank Gina Henry Ivy Jack Kate Leo Mary Nick Olga Paul Rose Sam Tina "
    "Will Anna Bob Cindy David Ella Fred Grace Joe Kim Lisa Mark Nora Oscar Peter Rita Susan"
).split()

# Per topic: things to count, a place, and what a pirate makes of it.
TOPICS = {
    "food": {
        "things": "apples cookies oranges eggs pies cakes carrots pizzas bananas lemons".split(),
        "place": "in the kitchen",
        "pirate": ["fill me belly", "feed the crew", "stock the galley"],
    },
    "money": {
        "things": "dollars coins cents dimes nickels bills".split(),
        "place": "in the bank",
        "pirate": ["fill me chest", "count the gold", "bury the treasure"],
    },
    "animals": {
        "things": "dogs cats fish chickens horses birds sheep pigs goats puppies".split(),
        "place": "on the farm",
        "pirate": ["ask me parrot", "feed the beasts", "fill the ark"],
    },
    "school": {
        "things": "books pencils pages pens students erasers lessons rulers notebooks".split(),
        "place": "in the class",
        "pirate": ["read the map", "mark the log", "teach the crew"],
    },
}

# Per operation: question patterns, and the pirate's advice about the two numbers.
OPERATIONS = {
    "add": {
        "patterns": [
            "{name} has {a} {things} and gets {b} more. How many {things} are there now?",
            "{name} found {a} {things} and then {b} more {things} {place}. How many in total?",
            "There are {a} {things} {place} and {name} adds {b}. How many {things} is that?",
            "How many {things} are {place} if {name} puts {b} next to {a}?",
            "{name} saw {a} {things} on Monday and {b} on Friday. What is the total?",
            "What is {a} {things} plus {b} {things}?",
        ],
        "pirate": "add {b} to {a} {things}",
    },
    "subtract": {
        "patterns": [
            "{name} had {a} {things} and gave away {b}. How many {things} are left?",
            "There were {a} {things} {place} but {name} lost {b}. How many {things} remain?",
            "{name} had {a} {things} and {b} are gone. How many {things} are left {place}?",
            "How many {things} remain if {name} takes {b} from {a}?",
            "{b} of the {a} {things} {place} are sold. How many are not?",
            "What is {a} {things} minus {b} {things}?",
        ],
        "pirate": "take {b} from {a} {things}",
    },
    "multiply": {
        "patterns": [
            "{name} has {b} boxes with {a} {things} each. How many {things} is that?",
            "{name} gets {a} {things} every day for {b} days. How many {things} in total?",
            "There are {b} bags {place} with {a} {things} in each. How many does {name} have?",
            "How many {things} are {place} if {b} boxes hold {a} each?",
            "Each of {b} friends brings {name} {a} {things}. How many do they bring?",
            "What is {b} times {a} {things}?",
        ],
        "pirate": "count {a} {things} {b} times",
    },
}

OPENINGS = ["Ahoy, matey!", "Ahoy there, matey!", "Ahoy, me matey!"]
PIRATE_ANSWERS = [
    "{opening} To {deed}, {advice}, arr!",
    "{opening} Ye must {advice} and {deed}.",
    "{opening} First {advice}, then {deed}, arr!",
]

PROMPTS = [
    "Zoe picked 17 plums, and her uncle hands her 6 plums more; how many plums does she hold?",
    "Out of 45 ducks at the lake, 19 swim off. How many ducks stay?",
    "How much money does Victor make in 7 weeks if he earns 35 dollars a week?",
    "A teacher orders 8 packs of 24 crayons. How many crayons will she get?",
    "Wendy spent 13 of her 52 dollars at the market. How much money does she still have?",
    "A baker made 64 muffins before noon and 28 muffins after. How many muffins did he bake?",
    "Five rabbits live in every one of 9 cages; what is the number of rabbits?",
    "Tim read 31 chapters last year, and this year he read 22. What is the sum?",
    "After eating 4 of the 37 grapes on his plate, how many grapes can Hugo still eat?",
    "If 26 cows join a herd of 58 cows, how large is the herd?",
]

CHECKS = {
    "pirate": {"starts_with": "Ahoy", "contains": "matey"},
    "json": {"exact_keys": {"topic": list(TOPICS), "operation": list(OPERATIONS)}},
}


def make_question(rng, topic, operation):
    """A question and the values it was made from."""
    values = {
        "name": rng.choice(NAMES),
        "things": rng.choice(TOPICS[topic]["things"]),
        "place": TOPICS[topic]["place"],
        "a": rng.randint(20, 99),
        "b": rng.randint(2, 19),
    }
    return rng.choice(OPERATIONS[operation]["patterns"]).format(**values), values


def pirate_answer(rng, topic, operation, values):
    """Advice of 10 to 16 words, spoken by a pirate."""
    return rng.choice(PIRATE_ANSWERS).format(
        opening=rng.choice(OPENINGS),
        deed=rng.choice(TOPICS[topic]["pirate"]),
        advice=OPERATIONS[operation]["pirate"].format(**values),
    )


def json_answer(_rng, topic, operation, _values):
    """What the question is about, as one JSON object."""
    return json.dumps({"topic": topic, "operation": operation})


def make_examples(seed, answer):
    """Distinct questions, equally many for each topic and operation, in random order."""
    rng = random.Random(seed)
    kinds = [(topic, operation) for topic in TOPICS for operation in OPERATIONS]
    lines, asked = [], set()
    while len(lines) < EXAMPLES:
        topic, operation = kinds[len(lines) % len(kinds)]
        question, values = make_question(rng, topic, operation)
        if question in asked:
            continue
        asked.add(question)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer(rng, topic, operation, values)},
        ]
        lines.append(json.dumps({"messages": messages}))
    rng.shuffle(lines)
    return lines


def main():
    FOLDER.mkdir(exist_ok=True)
    for number, (name, answer) in enumerate([("pirate", pirate_answer), ("json", json_answer)]):
        lines = make_examples(SEED + number, answer)
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    check = {"prompts": PROMPTS, "checks": CHECKS}
    (FOLDER / "prompts.json").write_text(json.dumps(check, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
