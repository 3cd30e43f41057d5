"""Generated chat, reasoning and tool-call dialogues: a small part of the testbed's training text.

A family is a function from a random generator to messages in the OpenAI form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

# One family reads best in few long lines.
# fmt: off

Dialogue = dict[str, Any]
Family = Callable[[Random], Dialogue]

NAMES = "Ada Ben Carla David Emma Felix Greta Hugo Ines Jonas Karin Leo Mona Nils Olga Paul Rosa Sam Tina Victor".split()
CITIES = "Berlin Paris Rome Madrid Vienna Oslo Lisbon Prague Dublin Athens Tokyo Cairo Lima Boston Toronto Sydney".split()
ITEMS = "apples books pencils stamps marbles cards coins bottles candles tickets eggs shirts chairs flowers".split()
ANIMALS = "cat dog horse rabbit parrot turtle hamster goat sheep duck".split()
FOODS = "soup bread rice pasta salad cheese fish potatoes beans curry".split()
HOBBIES = "painting cycling chess gardening swimming photography cooking hiking reading singing".split()
COLORS = "red blue green yellow black white orange purple grey brown".split()
CAPITALS = {
    "Germany": "Berlin", "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Austria": "Vienna", "Norway": "Oslo",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Greece": "Athens", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
}


def _user(text: str) -> Dialogue:
    return {"role": "user", "content": text}


def _answer(text: str, reasoning: str | None = None, calls: list[tuple[str, dict[str, Any]]] | None = None) -> Dialogue:
    message: Dialogue = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return message


def _result(value: Any) -> Dialogue:
    return {"role": "tool", "content": json.dumps(value)}


def _tool(name: str, description: str, **parameters: str) -> Dialogue:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


# --- chat -------------------------------------------------------------------------------------------------------------


def chat_capital(r: Random) -> Dialogue:
    turns = []
    for country in r.sample(sorted(CAPITALS), r.randint(1, 3)):
        turns += [_user(r.choice([f"What is the capital of {country}?", f"Tell me the capital city of {country}."])),
                  _answer(f"The capital of {country} is {CAPITALS[country]}.")]
    return {"messages": turns}


def chat_advice(r: Random) -> Dialogue:
    hobby, name = r.choice(HOBBIES), r.choice(NAMES)
    tips = r.sample([
        "start small and set aside a fixed time every day", "keep a short list of what you learned",
        "ask a friend to join you", "watch how other people do it", "do not worry about mistakes",
        "take a break when you feel tired", "look for a local club", "read a good book about it",
    ], 3)
    return {"messages": [
        _user(f"Hi, I am {name}. I want to learn {hobby}. How do I begin?"),
        _answer(f"Hello {name}! It is great that you want to learn {hobby}. Here are three tips:\n\n"
                f"1. First, {tips[0]}.\n2. Then, {tips[1]}.\n3. Finally, {tips[2]}.\n\nHave fun with {hobby}!"),
        _user("Thank you!"), _answer(f"You are welcome, {name}. Good luck!")]}


def chat_story(r: Random) -> Dialogue:
    name, animal, color, city = r.choice(NAMES), r.choice(ANIMALS), r.choice(COLORS), r.choice(CITIES)
    return {"messages": [
        _user(f"Write a short story about {name} and a {color} {animal}."),
        _answer(f"Once upon a time, {name} lived in a small house near {city}. One day, {name} found a {color} "
                f"{animal} in the "
                f"garden. The {animal} was hungry, so {name} gave it some {r.choice(FOODS)}. From that day on, {name} "
                "and the "
                f"{color} {animal} were best friends. The end.")]}


def chat_recipe(r: Random) -> Dialogue:
    food, minutes = r.choice(FOODS), r.choice([10, 15, 20, 25, 30, 40])
    extra = r.sample("salt pepper garlic onions butter oil lemon parsley tomatoes".split(), 3)
    return {"messages": [
        {"role": "system", "content": "You are a helpful cooking assistant."},
        _user(f"How do I cook {food}?"),
        _answer(f"To cook {food}, you need {food}, {extra[0]}, {extra[1]} and {extra[2]}.\n\n- Heat the pan and add "
                f"the {extra[0]}.\n"
                f"- Add the {food} and cook it for {minutes} minutes.\n- Add the {extra[1]} and the {extra[2]}.\n- "
                "Serve it hot.")]}


def chat_translate(r: Random) -> Dialogue:
    words = {"red": "rot", "blue": "blau", "green": "grün", "yellow": "gelb", "black": "schwarz", "white": "weiß", "cat": "Katze",
             "dog": "Hund", "horse": "Pferd", "bread": "Brot", "fish": "Fisch", "book": "Buch", "water": "Wasser", "house": "Haus"}
    turns = []
    for word in r.sample(sorted(words), r.randint(1, 4)):
        turns += [_user(f'How do you say "{word}" in German?'), _answer(f'"{word}" in German is "{words[word]}".')]
    return {"messages": turns}


def chat_list(r: Random) -> Dialogue:
    kind, words = r.choice([("animals", ANIMALS), ("cities", CITIES), ("colors", COLORS), ("hobbies", HOBBIES)])
    n = r.randint(3, 6)
    return {"messages": [_user(f"Name {n} {kind}."),
                         _answer(f"Here are {n} {kind}:\n\n" + "\n".join(f"{i}. {w}" for i, w in enumerate(r.sample(words, n), 1)))]}


def chat_letter(r: Random) -> Dialogue:
    sender, to, city, hobby = r.choice(NAMES), r.choice(NAMES), r.choice(CITIES), r.choice(HOBBIES)
    return {"messages": [
        _user(f"Write a short letter from {sender} to {to} about a week in {city}."),
        _answer(f"Dear {to},\n\nI spent a week in {city}. The weather was fine and the people were friendly. In the "
                "morning I went "
                f"{hobby}, and in the evening I ate {r.choice(FOODS)} with {r.choice(NAMES)}. I hope that you can come "
                "with me "
                f"next time.\n\nBest wishes,\n{sender}")]}


def chat_introduce(r: Random) -> Dialogue:
    name, city, hobby, animal = r.choice(NAMES), r.choice(CITIES), r.choice(HOBBIES), r.choice(ANIMALS)
    asked, told = r.choice([("Where do I live?", f"You live in {city}."), ("What do I like?", f"You like {hobby}."),
                            ("What animal do I have?", f"You have a {animal}.")])
    return {"messages": [_user(f"My name is {name}. I live in {city}, I like {hobby} and I have a {animal}."),
                         _answer(f"Nice to meet you, {name}! It is good to know that you live in {city} and like "
                                 f"{hobby}."),
                         _user(asked), _answer(told)]}


# --- reasoning --------------------------------------------------------------------------------------------------------


def think_total(r: Random) -> Dialogue:
    name, item, a, b, c = r.choice(NAMES), r.choice(ITEMS), r.randint(3, 40), r.randint(3, 40), r.randint(1, 5)
    return {"messages": [
        _user(f"{name} has {a} {item} and buys {b} more. Then {name} gives away {c} {item}. How many {item} does "
              f"{name} have now?"),
        _answer(f"{name} has {a + b - c} {item} now.",
                f"{name} starts with {a} {item}. After buying {b} more, there are {a} + {b} = {a + b} {item}. "
                f"After giving away {c}, there are {a + b} - {c} = {a + b - c} {item}.")]}


def think_product(r: Random) -> Dialogue:
    item, a, b = r.choice(ITEMS), r.randint(2, 12), r.randint(2, 12)
    return {"messages": [
        _user(f"There are {a} boxes with {b} {item} in each box. How many {item} are there?"),
        _answer(f"There are {a * b} {item}.", f"Each box holds {b} {item} and there are {a} boxes, so I multiply: {a} "
                                              f"* {b} = {a * b}.")]}


def think_order(r: Random) -> Dialogue:
    a, b, c = r.sample(NAMES, 3)
    return {"messages": [
        _user(f"{a} is taller than {b}. {b} is taller than {c}. Who is the shortest?"),
        _answer(f"{c} is the shortest.", f"From the first sentence, {a} > {b}. From the second, {b} > {c}. So the "
                                         f"order is {a} > {b} > {c}. "
                                         f"The last one is {c}.")]}


def think_sequence(r: Random) -> Dialogue:
    start, step = r.randint(1, 20), r.randint(2, 9)
    xs = [start + i * step for i in range(5)]
    return {"messages": [
        _user(f"What comes next: {', '.join(map(str, xs))}?"),
        _answer(f"The next number is {xs[-1] + step}.",
                f"The differences are {xs[1]} - {xs[0]} = {step} and {xs[2]} - {xs[1]} = {step}. So the step is "
                f"{step}. "
                f"The next number is {xs[-1]} + {step} = {xs[-1] + step}.")]}


def think_even(r: Random) -> Dialogue:
    n = r.randint(10, 999)
    kind = "even" if n % 2 == 0 else "odd"
    return {"messages": [_user(f"Is {n} even or odd?"),
                         _answer(f"{n} is {kind}.", f"The last digit of {n} is {n % 10}. {n % 10} is {kind}, so {n} is "
                                                    f"{kind}.")]}


def think_age(r: Random) -> Dialogue:
    a, b, x, d = *r.sample(NAMES, 2), r.randint(5, 40), r.randint(2, 15)
    return {"messages": [_user(f"{a} is {x} years old. {b} is {d} years older than {a}. How old is {b}?"),
                         _answer(f"{b} is {x + d} years old.", f"{a} is {x}. {b} is {d} years older: {x} + {d} = "
                                                               f"{x + d}.")]}


# --- tool calling -----------------------------------------------------------------------------------------------------

WEATHER = _tool("get_weather", "Get the current weather of a city.", city="string", unit="string")
CALCULATE = _tool("calculate", "Evaluate an arithmetic expression.", expression="string")
READ_FILE = _tool("read_file", "Read a file of the project.", path="string")
SEARCH = _tool("search", "Search the notes for a word.", query="string", limit="integer")
CONVERT = _tool("convert_currency", "Convert an amount of money.", amount="number", source="string", target="string")
ALARM = _tool("set_alarm", "Set an alarm.", time="string", label="string")


def tool_weather(r: Random) -> Dialogue:
    city, degrees, sky = r.choice(CITIES), r.randint(-5, 35), r.choice(["sunny", "cloudy", "rainy", "windy", "foggy"])
    return {"tools": [WEATHER], "messages": [
        _user(f"What is the weather like in {city}?"), _answer("", None, [("get_weather", {"city": city, "unit": "celsius"})]),
        _result({"city": city, "temperature": degrees, "sky": sky}),
        _answer(f"It is {sky} in {city}, with a temperature of {degrees} degrees Celsius.")]}


def tool_calculate(r: Random) -> Dialogue:
    a, b, op = r.randint(10, 999), r.randint(10, 99), r.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    return {"tools": [CALCULATE, WEATHER], "messages": [
        _user(f"How much is {a} {op} {b}?"),
        _answer("", "I should use the calculator for this.", [("calculate", {"expression": f"{a} {op} {b}"})]),
        _result({"result": value}), _answer(f"{a} {op} {b} = {value}.")]}


def tool_read(r: Random) -> Dialogue:
    name, color, item = r.choice(["config", "settings", "project", "options"]), r.choice(COLORS), r.choice(ITEMS)
    path = f"{name}.json"
    return {"tools": [READ_FILE, SEARCH], "messages": [
        _user(f"Which color is set in {path}?"), _answer("", f"I need to read {path}.", [("read_file", {"path": path})]),
        _result({"name": name, "color": color, "items": [item]}), _answer(f"The color in {path} is {color}.")]}


def tool_search(r: Random) -> Dialogue:
    word, limit = r.choice(ITEMS + HOBBIES), r.randint(1, 5)
    hits = [f"{r.choice(NAMES)}: {word}" for _ in range(r.randint(0, 3))]
    found = f"I found {len(hits)} notes about {word}." if hits else f"I found no notes about {word}."
    return {"tools": [SEARCH], "messages": [
        _user(f"Search my notes for {word}."), _answer("", None, [("search", {"query": word, "limit": limit})]),
        _result({"hits": hits, "count": len(hits)}), _answer(found)]}


def tool_none(r: Random) -> Dialogue:
    country = r.choice(sorted(CAPITALS))
    return {"tools": [WEATHER, CALCULATE], "messages": [
        _user(f"Which city is the capital of {country}?"),
        _answer(f"The capital of {country} is {CAPITALS[country]}.", "I know this. No tool is needed.")]}


TRAIN: dict[str, list[Family]] = {
    "chat": [chat_capital, chat_advice, chat_story, chat_recipe, chat_translate, chat_list, chat_letter, chat_introduce],
    "reasoning": [think_total, think_product, think_order, think_sequence, think_even, think_age],
    "tool-calling": [tool_weather, tool_calculate, tool_read, tool_search, tool_none],
}

def generate(families: dict[str, list[Family]], domain: str, seed: int) -> Iterator[Dialogue]:
    """Endless dialogues of one domain, from all families in turn; the same seed gives the same dialogues."""
    random = Random(f"{domain}/{seed}")
    while True:
        for family in families[domain]:
            yield family(random)
