"""Checks of arguments. Each returns the value, or raises an error with the parameter, its value and valid values.

They are called by the name of the module: ``validate.one_of(preset, PRESETS, "preset")``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any

import numpy as np

from .stores import note

#: Number of names that an error lists.
_SHOWN = 20
#: Characters of each end of a path that an error shows.
_LONG_PATH = 60


def format_list(values: Iterable[object], n: int = 5) -> str:
    """Join the first values by commas and count the rest: ``"a, b, … (7 in all)"``."""
    found = [str(value) for value in values]
    return ", ".join(found) if len(found) <= n else f"{', '.join(found[:n])}, … ({len(found)} in all)"


def suggest(name: object, known: Iterable[object], n: int = 3) -> str:
    """Return similar names to a misspelt one, as the end of an error; empty if there are none."""
    from difflib import get_close_matches

    folded: dict[str, str] = {}
    for value in map(str, known):
        folded.setdefault(value.lower(), value)
    found = [folded[key] for key in get_close_matches(str(name).lower(), list(folded), n=n)]
    return f"; near {name!r}: {found}" if found else ""


def one_of(value: Any, valid: Iterable[Any], parameter: str) -> Any:
    """Check that a value is one of several choices."""
    choices = list(valid)
    # Do not use `in`: True equals 1, and arrays are compared elementwise.
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    raise ValueError(f"`{parameter}` is {value!r}, valid: {choices}{suggest(value, choices)}")


def key_in(key: Any, available: Iterable[Any], parameter: str, *, what: str = "a column of obs", hint: str = "") -> Any:
    """Check that a name is available; ``what`` it names has an article, and ``hint`` ends the error."""
    names = list(available)
    if isinstance(key, str | int | float | tuple) and key in names:
        return key
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ValueError(f"`{parameter}` {key!r} is not {what}, valid: {names[:_SHOWN]}{more}{suggest(key, names)}{hint}")


def existing_key(key: Any, available: Iterable[Any], parameter: str, hint: str = "") -> Any:
    """Check that a named element, layer or table exists."""
    if key in (names := sorted(available)):
        return key
    raise ValueError(f"`{parameter}` {key!r} not found, valid keys: {names}{hint}")


def not_ambiguous(candidates: Collection[str], parameter: str) -> None:
    """Raise if there are several candidates, of which the user has to name one."""
    if len(candidates) > 1:
        raise ValueError(f"`{parameter}` is ambiguous, candidates: {sorted(candidates)}")


def all_in(names: Iterable[Any], valid: Iterable[Any], parameter: str, what: str) -> None:
    """Raise for names that are not valid; ``what`` is the reason in the error, such as ``"was not tested"``."""
    known = list(dict.fromkeys(valid))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`{parameter}` {unknown} {what}, valid: {known}{suggest(unknown[0], known)}")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(np.isfinite(value))


def whole_number(value: Any, parameter: str, least: int = 1, most: float = np.inf) -> int:
    """Check that a value is a whole number from ``least`` to ``most``."""
    if is_whole(value) and least <= value <= most:
        return int(value)
    end = "" if most == np.inf or not is_whole(value) or value < least else f" to {most:,.0f}"
    raise ValueError(f"`{parameter}` is {value!r}; a whole number from {least}{end} is needed")


def in_range(
    value: Any,
    parameter: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    what: str = "a number",
) -> float:
    """Check that a number is finite and in a range; ``least`` and ``most`` are included, ``above`` and ``below`` are not."""
    limits = (("from", least, ge), ("above", above, gt), ("to", most, le), ("below", below, lt))
    if is_number(value) and all(bound is None or holds(value, bound) for _, bound, holds in limits):
        return value
    bounds = [f"{word} {bound:g}" for word, bound, _ in limits if bound is not None]
    raise ValueError(f"`{parameter}` is {value!r}; {' '.join([what, ' and '.join(bounds)]).strip()} is needed")


def instance(value: Any, kinds: type | tuple[type, ...], parameter: str, needed: str) -> Any:
    """Check the type of a value; ``needed`` names the valid type, with its article."""
    if isinstance(value, kinds):
        return value
    raise TypeError(f"`{parameter}` is of type {type(value).__name__}; {needed} is needed")


def running_client(client: Any) -> None:
    """Check that ``client`` is a running client of dask.distributed."""
    from distributed import Client

    if not isinstance(client, Client):
        raise TypeError(
            f"`client` is of type {type(client).__name__}; a distributed.Client is needed: Client('tcp://ADDRESS:8786')"
        )
    if client.asynchronous or client.status != "running":
        found = "asynchronous" if client.asynchronous else client.status
        raise ValueError(f"`client` is {found}; a running, synchronous client is needed")


def names(value: Any, parameter: str, *, least: int = 0, one: bool = False) -> list[Any]:
    """Check that a value is a list of names; a single text raises, or, with ``one``, is turned into a list."""
    what = "genes" if parameter == "genes" else "texts"
    if isinstance(value, str):
        if one:
            return [value]
        raise ValueError(f"`{parameter}` is the text {value!r}; a list is needed: [{value!r}]")
    is_list = isinstance(value, Iterable) and not isinstance(value, Mapping | bytes)
    found: Any = list(value) if is_list else value
    if not is_list or len(found) < least or not all(isinstance(part, str | int | float | np.generic) for part in found):
        number = f", at least {least}," if least else ""
        raise ValueError(f"`{parameter}` is {found!r}; a list of {what}{number} is needed")
    return found


def folder_or_file(value: Any, parameter: str) -> Path:
    """Check that a value is a path that a file system can have."""
    if not isinstance(value, str | Path) or not str(value).strip():
        shown = str(value) if isinstance(value, Path) else value
        raise ValueError(f"`{parameter}` is {shown!r}; a path is needed")
    try:
        path = Path(value).expanduser()
        # The function that opens the path raises if it is missing or not accessible.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, a too long name, circular links, ~nobody
        text = repr(str(value))
        shown = text if len(text) <= 2 * _LONG_PATH else f"{text[:_LONG_PATH]}…{text[-_LONG_PATH:]}"
        raise ValueError(f"`{parameter}` {shown} is not a path that can be opened: {error}") from error
    return path


def all_different(values: Collection[Any], parameter: str, what: str = "names") -> None:
    """Check that values are unique."""
    if twice := [value for value, n in Counter(values).items() if n > 1]:
        raise ValueError(f"`{parameter}`: {what} are duplicated: {format_list(map(repr, twice))}")


def known_arguments(given: Mapping[str, Any], valid: Sequence[str], verb: str) -> None:
    """Raise for arguments that a function does not pass on to the library that it calls."""
    if unknown := sorted(set(given) - set(valid)):
        raise ValueError(f"`{unknown[0]}` is not an argument of {verb}, valid besides its own: {', '.join(valid)}")


def arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check the types of texts, numbers, flags and seeds (whole numbers from 0), and record the stores of objects.

    Call it first in a public function, as ``validate.arguments(predict, locals())``: a decorator would add a frame, and
    warnings would no longer point at the caller. The function itself checks parameters with other annotations.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given = {**given, **given.get(name, {})}
    for name, check, is_optional in _checks(function):
        if name in given and not (is_optional and given[name] is None):
            check(given[name], name)
    for value in given.values():
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if hasattr(part, "gen_elements"):
                note(part)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function by name, including those of ``**options: Unpack[...]`` of a ``TypedDict``."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        unpacked = str(parameter.annotation).strip("'").removeprefix("Unpack[").removesuffix("]")
        if parameter.kind is not parameter.VAR_KEYWORD or unpacked == str(parameter.annotation):
            found[name] = parameter
            continue
        for key, annotation in function.__globals__[unpacked].__annotations__.items():
            text = getattr(annotation, "__forward_arg__", annotation)
            found[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=text)
    return found


class Checked:
    """Base of frozen dataclasses whose texts, numbers and flags are checked on construction."""

    def __post_init__(self) -> None:
        arguments(type(self), vars(self))

    def set(self, **values: Any) -> None:
        """Set fields of the frozen object during construction."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@functools.cache
def _checks(function: Callable[..., Any]) -> list[tuple[str, Callable[[Any, str], Any], bool]]:
    """Return the parameters that have a check by their annotation, the check, and whether ``None`` is valid."""
    found = []
    for name, parameter in parameters(function).items():
        text = inspect.formatannotation(parameter.annotation)
        kinds = {kind.strip(" '").partition("[")[0] for kind in text.split("|")}
        check = _check_seed if name == "seed" else _CHECKS.get(frozenset(kinds - {"None"}))
        if check is not None:
            found.append((name, check, "None" in kinds))
    return found


def _check_seed(value: Any, parameter: str) -> int:
    # scikit-learn, leiden and numpy's legacy generators do not accept larger seeds.
    return whole_number(value, parameter, 0, 2**31 - 1)


def _is_real(value: object) -> bool:
    return is_whole(value) or (isinstance(value, float | np.floating) and not np.isnan(value))


def _checker(is_valid: Callable[[Any], bool], needed: str, *, by_type: bool = False) -> Callable[[Any, str], Any]:
    def check(value: Any, parameter: str) -> Any:
        if is_valid(value):
            return value
        found = f"of type {type(value).__name__}" if by_type else repr(value)
        raise ValueError(f"`{parameter}` is {found}; {needed} is needed")

    return check


#: ``flag(value, parameter)``: check that a value is True or False; ``name``: that it is a text that is not blank.
flag = _checker(lambda value: isinstance(value, bool | np.bool_), "True or False")
name = _checker(lambda value: isinstance(value, str) and bool(value.strip()), "a name")
#: Checks by annotation. The function itself checks the range of numbers; infinity may be valid.
_CHECKS: dict[frozenset[str], Callable[[Any, str], Any]] = {
    frozenset({"str"}): _checker(lambda value: isinstance(value, str), "a text", by_type=True),
    frozenset({"str", "Mapping"}): _checker(
        lambda value: isinstance(value, str | Mapping), "a text, or a mapping to texts,", by_type=True
    ),
    frozenset({"bool"}): flag,
    frozenset({"int"}): _checker(is_whole, "a whole number"),
    frozenset({"float"}): _checker(_is_real, "a number"),
}
