"""Invent conversations: something said long ago is asked for, among turns that tell other things.

Earlier turns are documents of the memory, written as :func:`~focus_core.model.chat.fit_messages` moves them there
(``user: ...``, one a turn); the last turns and the question are the local context, in the base's chat template. What is
invented depends on the random generator alone.
"""

from __future__ import annotations

import random

from focus_core.training.facts import invent_value
from focus_core.training.scenes import Asked, Scene

_PETS = [
    "Waffle",
    "Pepper",
    "Bruno",
    "Mochi",
    "Ziggy",
    "Nutmeg",
    "Rusty",
    "Olive",
    "Pixel",
    "Tango",
    "Clover",
    "Figaro",
]
_TOWNS = [
    "Bergen",
    "Cadiz",
    "Dover",
    "Ghent",
    "Leeds",
    "Nantes",
    "Porto",
    "Turin",
    "Utrecht",
    "York",
    "Aarhus",
    "Split",
]
_JOBS = [
    "a nurse",
    "a plumber",
    "a teacher",
    "an architect",
    "a pilot",
    "a baker",
    "a lawyer",
    "a gardener",
    "a chemist",
]
_FOODS = ["peanuts", "shellfish", "milk", "eggs", "strawberries", "gluten", "soy", "celery", "mustard"]
_COLOURS = ["green", "purple", "orange", "grey", "turquoise", "yellow", "dark red", "black"]
_HOBBIES = ["chess", "rowing", "pottery", "climbing", "sailing", "painting", "fencing", "knitting", "bird watching"]

_FACTS: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    (("My {k} is called {v}.", "I have a {k} named {v}.", "We just got a {k}, her name is {v}."),
     ("What is my {k} called?", "What is my {k}'s name?", "Do you remember the name of my {k}?"),
     "Your {k} is called {v}."),
    (("My {r}'s name is {v}.", "My {r} is called {v}.", "{v} is my {r}."),
     ("What is my {r}'s name?", "Who is my {r}?", "What is the name of my {r}?"), "Your {r}'s name is {v}."),
    (("I live in {v}.", "I moved to {v} last year.", "My flat is in {v}."),
     ("Where do I live?", "Which city do I live in?"), "You live in {v}."),
    (("I work as {v}.", "I am {v}.", "For a living I am {v}."),
     ("What is my job?", "What do I do for a living?"), "You work as {v}."),
    (("I am allergic to {v}.", "I can't eat {v}, I am allergic.", "Please note that I am allergic to {v}."),
     ("What am I allergic to?", "What can't I eat?"), "You are allergic to {v}."),
    (("My favourite colour is {v}.", "I like {v} best of all colours."),
     ("What is my favourite colour?", "Which colour do I like best?"), "Your favourite colour is {v}."),
    (("My hobby is {v}.", "In my free time I love {v}."),
     ("What is my hobby?", "What do I love in my free time?"), "Your hobby is {v}."),
    (("My birthday is on {v}.", "I was born on {v}."), ("When is my birthday?", "When was I born?"),
     "Your birthday is on {v}."),
    (("My {c} is {v}.", "Remember my {c}: {v}.", "The {c} you asked for is {v}."),
     ("What is my {c}?", "Can you tell me my {c} again?"), "Your {c} is {v}."),
    (("The meeting with {m} is in room {v}.", "I meet {m} in room {v}."),
     ("In which room is the meeting with {m}?", "Where do I meet {m}?"), "The meeting with {m} is in room {v}."),
    (("{m} owes me {v} euros.", "I lent {m} {v} euros."),
     ("How much does {m} owe me?", "How many euros did I lend {m}?"), "{m} owes you {v} euros."),
]  # fmt: skip
_SMALL_TALK = [
    ("Can you tell me a joke?", "Why did the scarecrow get a prize? He was outstanding in his field."),
    ("How are you today?", "I am fine, thank you. How can I help you?"),
    ("What is a good book for a long flight?", "A long novel with short chapters is a good choice."),
    ("How do I boil an egg?", "Put it into boiling water for seven minutes and cool it at once."),
    ("It is raining again.", "Then it is a good day to stay inside with a cup of tea."),
    ("Give me an idea for dinner.", "You could make a soup of lentils and carrots."),
    ("Thank you!", "You are welcome."),
    ("What makes the sky blue?", "Air scatters blue light more than red light."),
    ("I am tired of meetings.", "A short walk between two of them may help."),
    ("Which is larger, a whale or an elephant?", "A blue whale is much larger than an elephant."),
    ("How long should I study a day?", "Two hours with a break are better than four without one."),
    ("Write me a short greeting.", "Dear all, I hope that this finds you well."),
]
_REPLIES = [
    "Nice!",
    "Thanks for telling me.",
    "Good to know.",
    "I see.",
    "Noted.",
    "That sounds good.",
    "Got it, I will remember.",
]
_TOPICS = ["the weather", "trains", "old maps", "bread", "the stars", "football", "gardens", "music", "bees", "rivers"]
_FILLER = ["I read about it yesterday.", "It is more complicated than it looks.", "My neighbour talks of nothing else.",
           "There is a museum about it.", "I never understood it.", "It costs a lot of time.",
           "People have strong opinions on it."]  # fmt: skip


def invent_conversation(rng: random.Random, turns: int, questions: int, recent: int) -> Scene:
    """Invent a conversation of ``turns`` earlier turns that hold facts, and questions about some of these.

    Args:
        rng: draws everything.
        turns: earlier turns, user and assistant; at least two.
        questions: at most so many.
        recent: most turns of small talk in front of each question.
    """
    told = rng.sample(_FACTS, min(len(_FACTS), max(1, rng.randint(1, max(1, turns // 4)))))
    facts = [_fact(rng, *kind) for kind in told]
    spoken: list[tuple[str, str]] = [(said, rng.choice(_REPLIES)) for said, _ in facts]
    while 2 * len(spoken) < turns:
        spoken.append(_chatter(rng))
    if rng.random() < 0.5:
        rng.shuffle(spoken)  # otherwise the facts come first, as in a conversation that began with them
    documents = [line for user, assistant in spoken for line in (f"user: {user}", f"assistant: {assistant}")]
    asked = []
    for _, item in rng.sample(facts, min(questions, len(facts))):
        last = [part for _ in range(rng.randint(0, recent // 2)) for part in _chatter(rng)]
        asked.append(Asked(item.question, item.answer, item.sentence, item.clues, tuple(last), chat=True))
    return Scene(tuple(documents), tuple(asked))


def _fact(rng: random.Random, said: tuple[str, ...], asked: tuple[str, ...], answer: str) -> tuple[str, Asked]:
    """Return a statement, with something else around it at times, and the question for it."""
    names = {
        "k": rng.choice(["dog", "cat", "parrot", "horse", "rabbit", "hamster"]),
        "r": rng.choice(["sister", "brother", "boss", "best friend", "daughter", "doctor", "landlord"]),
        "c": rng.choice(["customer number", "flight number", "locker code", "order number", "ticket number"]),
        "m": rng.choice(["Nora", "Ivan", "Greta", "Omar", "Lucia", "Felix"]),
    }
    shape = answer.format(**names, v="{v}")
    values = {
        "dog": lambda: rng.choice(_PETS), "name": lambda: invent_value(rng, "name"), "live": lambda: rng.choice(_TOWNS),
        "work": lambda: rng.choice(_JOBS), "allergic": lambda: rng.choice(_FOODS),
        "colour": lambda: rng.choice(_COLOURS),
        "hobby": lambda: rng.choice(_HOBBIES), "birthday": lambda: invent_value(rng, "date"),
        "number": lambda: str(rng.randrange(10**3, 10 ** rng.randint(4, 8))),
    }  # fmt: skip
    kinds = {"called": "dog", "'s name": "name", "live": "live", "work": "work", "allergic": "allergic",
             "colour": "colour", "hobby": "hobby", "birthday": "birthday"}  # fmt: skip
    kind = next((value for word, value in kinds.items() if word in answer), "number")
    names["v"] = values[kind]()
    statement = rng.choice(said).format(**names)
    around = rng.random()
    whole = statement
    if around < 0.25:
        whole = f"{rng.choice(_FILLER)} {statement}"
    elif around < 0.5:
        whole = f"{statement} {rng.choice(_SMALL_TALK)[0]}"
    question = rng.choice(asked).format(**names)
    return whole, Asked(question, names["v"], shape.format(v=names["v"]), (f"user: {whole}",), chat=True)


def _chatter(rng: random.Random) -> tuple[str, str]:
    """Return a user's turn that tells nothing to remember, and the reply."""
    if rng.random() < 0.5:
        return rng.choice(_SMALL_TALK)
    topic = rng.choice(_TOPICS)
    said = " ".join(rng.choices(_FILLER, k=rng.randint(1, 6)))
    reply = " ".join(rng.choices(_FILLER, k=rng.randint(0, 3)))
    return f"Tell me something about {topic}. {said}", f"Sure, {topic} can be interesting. {reply}".strip()
