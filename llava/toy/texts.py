"""What can be said about a scene: captions, the five steps of a description, tagged reasoning, questions.

All functions are pure: a scene (and a random generator) in, text out. The wording is small on purpose, so that a
model of a million parameters can learn it in minutes.
"""

import random
from dataclasses import dataclass

from llava.prompts import ANSWER_LETTER
from llava.toy.scenes import COLORS, CORNERS, SHAPES, STRIP, Scene, Thing

KINDS = ("color", "shape", "count", "exists", "relation", "place", "reading")


@dataclass(frozen=True)
class Question:
    """A question about a scene with its short answer, wrong options, and the reasoning that leads to the answer."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...]
    task: str
    reasoning: str


def a(name: str) -> str:
    """`name` with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def noun_phrase(thing: Thing) -> str:
    striped = "striped " if thing.texture == "striped" else ""
    return f"a {thing.size} {striped}{thing.color} {thing.shape}"


def printed_phrase(scene: Scene) -> str:
    kind = "digit" if scene.printed.isdigit() else "letter"
    return f"the {kind} {scene.printed} is printed at the {scene.printed_place}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def facts(scene: Scene) -> str:
    """Everything about the scene in words, in reading order: what an image says, without being one."""
    pieces = [f"{thing.size} {thing.texture} {thing.name} {thing.place}" for thing in scene.things]
    if scene.printed:
        pieces.append(f"{scene.printed} {scene.printed_place}")
    return ", ".join([*pieces, scene.background])


def short_caption(scene: Scene) -> str:
    """Alignment caption: the objects' names."""
    return " and ".join(a(thing.name) for thing in scene.things)


def description(scene: Scene) -> str:
    """A detailed description, the text of step 5."""
    sentences = [sentence(f"{noun_phrase(thing)} is at the {thing.place}") for thing in scene.things]
    if scene.printed:
        sentences.append(sentence(printed_phrase(scene)))
    return " ".join([*sentences, f"The background is {scene.background}."])


def description_steps(scene: Scene) -> list[str]:
    """The five answers of a Chain-of-Description (the headings belong to `llava.prompts`)."""
    shapes = " and ".join(f"a {thing.shape}" for thing in scene.things)
    details = [sentence(f"the {t.shape} is {t.size}, {t.color} and {t.texture}") for t in scene.things]
    pairs = [
        sentence(f"the {one.name} is {relation(one, two)} the {two.name}")
        for one, two in zip(scene.things, scene.things[1:], strict=False)
    ]
    text = sentence(printed_phrase(scene)) if scene.printed else "No text is printed."
    return [
        f"The image shows {shapes}.",
        " ".join(details),
        " ".join(pairs) or f"The {scene.things[0].shape} stands alone.",
        f"The background is {scene.background}. {text}",
        description(scene),
    ]


def relation(one: Thing, two: Thing) -> str:
    if one.place in STRIP:
        return "to the left of" if STRIP.index(one.place) < STRIP.index(two.place) else "to the right of"
    (row, column), (other_row, other_column) = divmod(CORNERS.index(one.place), 2), divmod(CORNERS.index(two.place), 2)
    if column != other_column:
        return "to the left of" if column < other_column else "to the right of"
    return "above" if row < other_row else "below"


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every kind of question this scene can answer, in the order of KINDS."""
    makers = (ask_color, ask_shape, ask_count, ask_exists, ask_relation, ask_place, ask_reading)
    return [question for maker in makers if (question := maker(scene, rng))]


def only(scene: Scene, field: str, rng: random.Random) -> Thing | None:
    """A thing whose `field` no other thing of the scene shares, or None."""
    values = [getattr(thing, field) for thing in scene.things]
    unique = [thing for thing in scene.things if values.count(getattr(thing, field)) == 1]
    return rng.choice(unique) if unique else None


def ask_color(scene: Scene, rng: random.Random) -> Question | None:
    thing = only(scene, "shape", rng)
    if thing is None:
        return None
    return Question(
        "color",
        f"What color is the {thing.shape}?",
        thing.color,
        tuple(COLORS),
        f"I need to find the color of the {thing.shape}.",
        f"The {thing.shape} is at the {thing.place}. It is {thing.color}.",
    )


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    thing = only(scene, "color", rng)
    if thing is None:
        return None
    return Question(
        "shape",
        f"What shape is the {thing.color} object?",
        thing.shape,
        SHAPES,
        f"I need to find the shape of the {thing.color} object.",
        f"The {thing.color} object is at the {thing.place}. It is {a(thing.shape)}.",
    )


def ask_count(scene: Scene, rng: random.Random) -> Question:
    number = len(scene.things)
    names = ", ".join(thing.name for thing in scene.things)
    return Question(
        "count",
        "How many shapes are there?",
        str(number),
        ("1", "2", "3", "4"),
        "I need to count the shapes.",
        f"The shapes are: {names}. That makes {number}.",
    )


def ask_exists(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        name, answer = rng.choice(scene.things).name, "yes"
        reasoning = f"There is {a(name)}."
    else:
        present = {thing.name for thing in scene.things}
        absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in present]
        name, answer = rng.choice(absent), "no"
        reasoning = f"There is no {name}."
    return Question(
        "exists",
        f"Is there {a(name)} in the image?",
        answer,
        ("yes", "no"),
        f"I need to find {a(name)}.",
        reasoning,
    )


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    one, two = rng.sample(scene.things, 2)
    true = relation(one, two)
    said = true if rng.random() < 0.5 else relation(two, one)
    return Question(
        "relation",
        f"Is the {one.name} {said} the {two.name}?",
        "yes" if said == true else "no",
        ("yes", "no"),
        f"I need to compare the places of the {one.name} and the {two.name}.",
        f"The {one.name} is at the {one.place}. The {two.name} is at the {two.place}. "
        f"The {one.name} is {true} the {two.name}.",
    )


def ask_place(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    places = STRIP if thing.place in STRIP else CORNERS
    return Question(
        "place",
        f"Where is the {thing.name}?",
        thing.place,
        places,
        f"I need to find the place of the {thing.name}.",
        f"The {thing.name} is at the {thing.place}.",
    )


def ask_reading(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.printed:
        return None
    pool = "123470" if scene.printed.isdigit() else "AEHKTX"
    kind = "digit" if scene.printed.isdigit() else "letter"
    return Question(
        "reading",
        f"Which {kind} is printed?",
        scene.printed,
        tuple(pool),
        f"I need to read the {kind}.",
        sentence(printed_phrase(scene)),
    )


def tagged_reasoning(scene: Scene, question: Question) -> str:
    """The four tagged parts of LLaVA-CoT."""
    caption = sentence(f"the image shows {short_caption(scene)}")
    return (
        f"<SUMMARY> {question.task} </SUMMARY>\n\n<CAPTION> {caption} </CAPTION>\n\n"
        f"<REASONING> {question.reasoning} </REASONING>\n\n<CONCLUSION> {question.answer} </CONCLUSION>"
    )


def multiple_choice(question: Question, rng: random.Random, count: int = 4) -> tuple[list[str], str]:
    """Shuffled options, the answer among them, and the answer's letter."""
    wrong = [option for option in question.options if option != question.answer]
    options = [question.answer, *rng.sample(wrong, min(count - 1, len(wrong)))]
    rng.shuffle(options)
    return options, "ABCD"[options.index(question.answer)]


def lettered(question: Question, rng: random.Random) -> tuple[str, str]:
    """The question as multiple choice with its instruction, and the answer's letter."""
    options, letter = multiple_choice(question, rng)
    listed = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", options, strict=False))
    return f"{question.text}\n{listed}\n{ANSWER_LETTER}", letter


def text_only(rng: random.Random) -> tuple[str, str]:
    """A question without an image, and its answer."""
    m, n = rng.randint(1, 5), rng.randint(1, 4)
    color, other = rng.sample(list(COLORS), 2)
    return rng.choice(
        [
            (f"What is {m} plus {n}?", str(m + n)),
            (f"Which word comes first, {color} or {other}?", min(color, other)),
            (f"Is {m} more than {n}?", "yes" if m > n else "no"),
            (f"Repeat the word {color}.", color),
        ]
    )
