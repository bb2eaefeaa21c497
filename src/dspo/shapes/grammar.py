"""The grammar of `shapes`: what a prompt may ask for, how it is written and how it is read back.

    prompt      := one-object | two-objects
    one-object  := object [position] [ground]
    two-objects := object relation object [ground]
    object      := "a" [size] [pattern] [colour] shape
    ground      := "on a" colour "background"

A part in brackets may be left out; what is left out is free, and every prompt leaves at least one attribute free.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dspo.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
SIZES = ("small", "large")
PATTERNS = ("solid", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the centre",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)  # row by row, so that index // 3 is the row and index % 3 the column
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "pattern": PATTERNS,
    "position": POSITIONS,
    "relation": RELATIONS,
    "background": COLOURS,
}
# What a prompt may ask for, by name: of each object, and of the whole.
ATTRIBUTES = (
    *(f"{name}_{i}" for i in (0, 1) for name in ("shape", "colour", "size", "pattern")),
    "position",
    "relation",
    "background",
)

_OBJECT = (
    rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<pattern>{'|'.join(PATTERNS)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?"
)
_OBJECT += rf"(?P<shape>{'|'.join(SHAPES)})"


def _numbered(pattern: str, number: int) -> str:
    return re.sub(r"\(\?P<(\w+)>", rf"(?P<\g<1>{number}>", pattern)


_PROMPT = re.compile(
    _numbered(_OBJECT, 0)
    + rf"(?: (?:(?P<position>{'|'.join(POSITIONS)})|(?P<relation>{'|'.join(RELATIONS)}) {_numbered(_OBJECT, 1)}))?"
    + rf"(?: on a (?P<background>{'|'.join(COLOURS)}) background)?"
)


@dataclass(frozen=True)
class ObjectRequest:
    """One object that a prompt asks for; ``None`` is free."""

    shape: str
    colour: str | None = None
    size: str | None = None
    pattern: str | None = None

    def words(self) -> str:
        return " ".join(["a", *(word for word in (self.size, self.pattern, self.colour) if word), self.shape])


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: one object with a position, or two with a relation."""

    objects: tuple[ObjectRequest, ...]
    position: str | None = None
    relation: str | None = None
    background: str | None = None

    def prompt(self) -> str:
        words = [self.objects[0].words()]
        if self.position:
            words.append(self.position)
        if self.relation:
            words += [self.relation, self.objects[1].words()]
        if self.background:
            words.append(f"on a {self.background} background")
        return " ".join(words)

    def combination(self) -> tuple[str | None, ...]:
        """Shape, colour and background together: what "seen in training" is counted over."""
        return (self.background, *(part for o in self.objects for part in (o.shape, o.colour)))


def parse(prompt: str) -> Request:
    """Read a prompt of the grammar. Raises :class:`UserError` for any other text."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise UserError(
            f"prompt {prompt[:80]!r} is not of the shapes grammar (src/dspo/shapes/grammar.py says which are)"
        )
    part: dict[str, Any] = match.groupdict()
    objects = [ObjectRequest(part["shape0"], part["colour0"], part["size0"], part["pattern0"])]
    if part["relation"]:
        objects.append(ObjectRequest(part["shape1"], part["colour1"], part["size1"], part["pattern1"]))
    return Request(tuple(objects), part["position"], part["relation"], part["background"])


def asked_value(request: Request, attribute: str) -> str | None:
    """What the request asks for the attribute, one of ATTRIBUTES; None where it is free or there is no such object."""
    name, _, number = attribute.partition("_")
    if not number:
        value: str | None = getattr(request, name)
        return value
    return getattr(request.objects[int(number)], name) if int(number) < len(request.objects) else None


def asked_attributes(request: Request) -> list[str]:
    return [attribute for attribute in ATTRIBUTES if asked_value(request, attribute)]


def changed(request: Request, attribute: str, rng: np.random.Generator) -> Request:
    """The request with another value for an attribute that it asks for."""
    name, _, number = attribute.partition("_")
    old = asked_value(request, attribute)
    change: dict[str, Any] = {name: str(rng.choice([value for value in VALUES[name] if value != old]))}
    if not number:
        return replace(request, **change)
    objects = tuple(replace(o, **change) if i == int(number) else o for i, o in enumerate(request.objects))
    return replace(request, objects=objects)


def wrong_request(request: Request, rng: np.random.Generator) -> Request:
    """The request with one of its attributes changed."""
    return changed(request, str(rng.choice(asked_attributes(request))), rng)


def confused_request(request: Request, rng: np.random.Generator) -> Request:
    """The request with its two objects' colours or places exchanged; with one object, an attribute changed."""
    if not request.relation:
        return wrong_request(request, rng)
    first, second = request.objects
    if rng.random() < 0.5:
        return replace(request, objects=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    return replace(request, objects=(second, first))


def random_request(rng: np.random.Generator) -> Request:
    """Draw a request: three in four ask for one object; at least one attribute is free."""
    two = rng.random() < 0.25
    colours = [str(c) for c in rng.permutation(COLOURS)]
    kept = rng.random(8)
    if two:
        first, second = (
            ObjectRequest(
                str(rng.choice(SHAPES)),
                colours[i],
                str(rng.choice(SIZES)) if kept[2 * i] < 0.35 else None,
                str(rng.choice(PATTERNS)) if kept[2 * i + 1] < 0.35 else None,
            )
            for i in range(2)
        )
        full = bool((kept[:4] < 0.35).all())  # then the background is what stays free
        background = colours[2] if kept[4] < 0.75 and not full else None
        return Request((first, second), None, str(rng.choice(RELATIONS)), background)
    free = rng.integers(4)  # this one is left free whatever the draws say
    wanted = ObjectRequest(
        str(rng.choice(SHAPES)),
        colours[0] if kept[5] < 0.9 else None,
        str(rng.choice(SIZES)) if free != 0 and kept[0] < 0.6 else None,
        str(rng.choice(PATTERNS)) if free != 1 and kept[1] < 0.6 else None,
    )
    position = str(rng.choice(POSITIONS)) if free != 2 and kept[2] < 0.6 else None
    background = colours[1] if free != 3 and kept[3] < 0.85 else None
    return Request((wanted,), position, None, background)


def random_prompt(rng: np.random.Generator) -> str:
    return random_request(rng).prompt()


def check_readable(prompts: Iterable[str], judges: Iterable[object]) -> None:
    """Raise :class:`UserError` for a prompt that those of ``evaluate.judges`` which belong to `shapes` cannot read."""
    if not {"gold", "second"} & {judge for judge in judges if isinstance(judge, str)}:
        return
    for prompt in prompts:
        try:
            parse(prompt)
        except UserError as error:
            raise UserError(
                f"{error}. The gold and the second judge read such prompts alone: give others, or take these judges "
                "out of evaluate.judges in params.yaml."
            ) from None
