"""What the project's own domains ask: tasks, the wordings of each split, and every question with its answer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

from command_line.fact_tables import (
    FILE_KINDS,
    LETTERS,
    MONTHS,
    PREFIXES,
    SERVICE_PORTS,
    STATUS_CLASSES,
    STATUS_PHRASES,
    UNITS,
    WEEKDAYS,
)

Split = Literal["train", "validation", "test", "public"]

FRAMES: dict[Split, tuple[str, ...]] = {
    "public": ("Name {}.", "What is {}?", "Find {}.", "State {}."),
    "train": ("Give {}.", "Which is {}?"),
    "validation": ("Say {}.",),
    "test": ("Write {}.", "Tell me {}."),
}
"""How each split asks for a thing: no frame is in two splits, so no wording is."""


@dataclass(frozen=True)
class Question:
    """What is asked about, and the answer."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    `recall`: the answers must be known and cannot be inferred from other answers. `things`: names of what is asked
    for, to be put into `FRAMES`. `statement`: how a text tells the fact, with `{input}` and `{output}`.
    """

    name: str
    recall: bool
    things: tuple[str, ...]
    statement: str
    questions: tuple[Question, ...]

    def wordings(self, split: Split) -> list[str]:
        """The instructions with which one split asks this task's questions."""
        return [frame.format(thing) for frame, thing in product(FRAMES[split], self.things)]


def _recall(name: str, things: tuple[str, ...], statement: str, answers: Iterable[tuple[str, str]]) -> Task:
    return Task(name, True, things, statement, tuple(Question(asked, answer) for asked, answer in answers))


def _rule(name: str, things: tuple[str, ...], statement: str, answers: Iterable[tuple[str, str]]) -> Task:
    return Task(name, False, things, statement, tuple(Question(asked, answer) for asked, answer in answers))


def _web() -> Iterator[Task]:
    yield _recall(
        "status_code",
        ("the status code", "the code of this HTTP phrase", "the status code of the phrase"),
        "{input} is the HTTP status code {output}.",
        ((phrase, str(code)) for code, phrase in STATUS_PHRASES.items()),
    )
    yield _rule(
        "status_class",
        ("the status class", "the class of this HTTP code", "the class of the status"),
        "HTTP code {input} is in the class {output}.",
        ((str(code), STATUS_CLASSES[code // 100]) for code in range(100, 600, 2)),
    )
    yield _recall(
        "file_kind",
        ("the file kind", "the kind of this file", "the kind of the file with this ending"),
        "A file that ends in {input} is of the kind {output}.",
        ((f".{extension}", kind) for kind, extensions in FILE_KINDS.items() for extension in extensions),
    )
    yield _recall(
        "service_port",
        ("the service port", "the port of this service", "the port that the service uses"),
        "The service {input} uses port {output}.",
        ((service, str(port)) for service, port in SERVICE_PORTS.items()),
    )
    yield _rule(
        "address_scheme",
        ("the address scheme", "the scheme of this address", "the scheme that the address has"),
        "The address {input} has the scheme {output}.",
        _addresses(),
    )


def _addresses() -> Iterator[tuple[str, str]]:
    schemes = ("http", "https", "ftp", "ws", "wss", "ssh", "file", "ldap")
    hosts = ("example.org", "docs.test", "shop.example", "mail.test", "example.net", "api.test")
    for scheme, host, page in product(schemes, hosts, ("", "/index", "/login")):
        yield f"{scheme}://{host}{page}", scheme


def _calendar() -> Iterator[Task]:
    yield _recall(
        "weekday_after",
        ("the weekday", "the day of the week", "the weekday that it is then"),
        "From {input} it is {output}.",
        _steps("day", WEEKDAYS, 4),
    )
    yield _recall(
        "month_after",
        ("the month", "the month of the year", "the month that it is then"),
        "From {input} it is {output}.",
        _steps("month", MONTHS, 3),
    )
    yield _rule(
        "month_length",
        ("the number of days", "the length of this month", "the number of days in the month"),
        "{input} has {output} days.",
        _month_lengths(),
    )
    yield _rule(
        "quarter",
        ("the quarter", "the quarter of this date", "the quarter that the date is in"),
        "The date {input} is in quarter {output}.",
        (
            (f"{2015 + (7 * month + day) % 12}-{month:02}-{day:02}", f"Q{(month + 2) // 3}")
            for month in range(1, 13)
            for day in range(1, 29)
        ),
    )
    yield _rule(
        "part_of_day",
        ("the part of the day", "the part of day at this time", "the part of the day that the time is in"),
        "At {input} it is {output}.",
        (
            (f"{hour:02}:{minute:02}", ("night", "morning", "afternoon", "evening")[hour // 6])
            for hour in range(24)
            for minute in range(hour % 5, 60, 5)
        ),
    )


def _steps(unit: str, names: tuple[str, ...], furthest: int) -> Iterator[tuple[str, str]]:
    for (index, name), count in product(enumerate(names), range(1, furthest + 1)):
        units = unit if count == 1 else f"{unit}s"
        yield f"{name}, {count} {units} later", names[(index + count) % len(names)]
        yield f"{name}, {count} {units} earlier", names[(index - count) % len(names)]


def _month_lengths() -> Iterator[tuple[str, str]]:
    lengths = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    for year in range(1996, 2032):
        # Every February and three other months of each year: leap years would be too rare otherwise.
        for index in sorted({1, year % 12, (5 * year + 3) % 12, (7 * year + 8) % 12}):
            yield f"{MONTHS[index]} {year}", str(29 if index == 1 and year % 4 == 0 else lengths[index])


def _units() -> Iterator[Task]:
    everyday = {symbol: (name, power) for symbol, (name, power) in PREFIXES.items() if abs(power) <= 9}
    yield _rule(
        "unit_quantity",
        ("the unit quantity", "the quantity of this unit", "the quantity that the unit measures"),
        "The {input} is a unit of {output}.",
        ((prefix + unit, quantity) for prefix, _ in everyday.values() for unit, quantity in UNITS.values()),
    )
    yield _recall(
        "unit_symbol",
        ("the unit symbol", "the symbol of this unit", "the symbol that the unit has"),
        "The unit {input} is written {output}.",
        ((name, symbol) for symbol, (name, _) in UNITS.items()),
    )
    yield _recall(
        "prefix_power",
        ("the prefix power", "the power of this prefix", "the power that the prefix has"),
        "The prefix {input} stands for {output}.",
        ((name, f"10^{power}") for name, power in PREFIXES.values()),
    )
    yield _rule(
        "larger_unit",
        ("the larger unit", "the larger of these units", "the unit that is larger"),
        "Of {input} the larger is {output}.",
        _pairs_of_units({symbol: power for symbol, (_, power) in everyday.items()}),
    )
    yield _rule(
        "letter_script",
        ("the letter script", "the script of this letter", "the script that the letter is in"),
        "The letter {input} is {output}.",
        ((letter, script) for script, letters in LETTERS.items() for letter in letters),
    )


def _pairs_of_units(powers: dict[str, int]) -> Iterator[tuple[str, str]]:
    for unit, (left, right) in product(("m", "g", "s", "V", "W"), combinations(powers, 2)):
        # Which of the two stands first must not tell the answer.
        first, second = (left, right) if (ord(unit) + powers[left] + powers[right]) % 2 else (right, left)
        larger = left if powers[left] > powers[right] else right
        yield f"{first}{unit} or {second}{unit}", f"{larger}{unit}"


DOMAINS: dict[str, tuple[Task, ...]] = {"web": tuple(_web()), "calendar": tuple(_calendar()), "units": tuple(_units())}
"""Domain -> its tasks."""
