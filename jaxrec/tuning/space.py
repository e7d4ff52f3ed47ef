"""What is searched: fields of the config, each with a range or a list of values."""

import dataclasses
from collections.abc import Mapping, Sequence

from optuna.trial import Trial

PREFIX = "search"
FORM = f"--{PREFIX}.FIELD=LOW..HIGH, LOW..HIGH:log or A,B,C"


@dataclasses.dataclass(frozen=True)
class Range:
    """All numbers of `[low, high]`; whole ones where both ends are written as whole numbers.

    Attributes:
      log: drawn evenly by their logarithm.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: Trial, field: str) -> str:
        """The trial's value, as an override writes it."""
        if self.whole:
            return str(trial.suggest_int(field, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(field, self.low, self.high, log=self.log))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few values, as an override writes them."""

    values: tuple[str, ...]

    def suggest(self, trial: Trial, field: str) -> str:
        """The trial's value."""
        return str(trial.suggest_categorical(field, self.values))


Space = Mapping[str, Range | Choice]


def parse_space(arguments: Sequence[str]) -> Space:
    """The space of `--search.FIELD=...` arguments, by the fields' dotted paths.

    Raises:
      ValueError: an argument is not of that form, or a field comes twice.
    """
    space: dict[str, Range | Choice] = {}
    for argument in arguments:
        field, equals, text = argument.removeprefix(f"--{PREFIX}.").partition("=")
        if not field or not equals or not text:
            raise ValueError(f"{argument!r} says no search; write {FORM}.")
        if field in space:
            raise ValueError(f"{field} is searched twice; name all its values in one --{PREFIX}.{field}.")
        space[field] = _range(argument, text) if ".." in text else _choice(argument, text)
    return space


def _range(argument: str, text: str) -> Range:
    numbers, _, scale = text.partition(":")
    low, _, high = numbers.partition("..")
    if scale not in ("", "log"):
        raise ValueError(f"{argument!r}: {scale!r} is no scale; write {FORM}.")
    try:
        found = Range(float(low), float(high), scale == "log", _is_whole(low) and _is_whole(high))
    except ValueError:
        raise ValueError(f"{argument!r}: {low!r} and {high!r} must be numbers; write {FORM}.") from None
    least = "0 < LOW < HIGH, for a logarithm" if found.log else "LOW < HIGH"
    if (
        not found.low < found.high < float("inf")
        or found.low == float("-inf")
        or (found.log and found.low <= 0)
    ):
        raise ValueError(f"{argument!r}: finite ends are needed with {least}.")
    return found


def _choice(argument: str, text: str) -> Choice:
    values = tuple(value.strip() for value in text.split(","))
    if "" in values or len(set(values)) != len(values) or len(values) < 2:
        raise ValueError(f"{argument!r}: two or more different values are needed; write {FORM}.")
    return Choice(values)


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdigit()
