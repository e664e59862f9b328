"""Odd arguments: every parameter of every verb, reader and getter with unusual values."""

import inspect
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

import he2gene_sc as hg
from tests.helpers.odd.harness import Odd
from tests.helpers.odd.verbs import KINDS, VERBS, arguments, clean, fields_of

#: Values by name, for the names of tests.
VALUES: dict[str, Any] = {
    "empty text": "",
    "blank": " ",
    "unknown text": "nope",
    "newline": "a\nb",
    "slash": "a/b",
    "dunder": "__x",
    "zero": 0,
    "minus one": -1,
    "fraction": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "true": True,
    "empty list": [],
    "empty dict": {},
    "object": object(),
    "bytes": b"x",
    "array": np.array([1.0, 2.0]),
}

#: Valid values, which may give another result than the default call.
MEANT = {
    ("key_added", "unknown text"),
    ("layer", "unknown text"),  # of predict: where it is written
    ("seed", "zero"),
    ("seed", "true"),
    ("tta", "true"),
    ("tta", "zero"),
    ("genes", "empty list"),
    ("reliable", "true"),
    ("lfc", "fraction"),
    ("min_mean", "fraction"),
    ("cross_fit", "true"),
}
#: Parameters that accept any truth value, or that the default call does not read.
FREE = {
    "show_progress_bar",
    "tile_windows",
    "copy",
    "ax",
    "save",
    "folder",
    "kwargs",
    "description",
    "intended_use",
    "limitations",
}

FUNCTIONS = {
    "predict": hg.tl.predict,
    "embed": hg.tl.embed,
    "evaluate": hg.tl.evaluate,
    "intervals": hg.tl.intervals,
    "adapt": hg.tl.adapt,
    "domain_preservation": hg.tl.domain_preservation,
    "biomarkers": hg.tl.biomarkers,
    "concordance": hg.tl.concordance,
    "train": hg.tl.train,
    "tissue": hg.pp.tissue,
    "grid": hg.pp.grid,
    "get.genes": hg.get.genes,
    "get.predicted": hg.get.predicted,
    "pl.spatial": hg.pl.spatial,
    "pl.annotation": hg.pl.annotation,
}


def _odd(verb: str, parameter: str, what: str) -> Odd:
    def make() -> tuple[Callable[[], Any], list[Any], Any]:
        objects = VERBS[verb].inputs()
        kwargs = {**arguments(verb), parameter: VALUES[what]}
        expected = clean(verb)

        def call() -> Any:
            returned = VERBS[verb].call(objects, **kwargs)
            if (parameter, what) in MEANT:
                return expected
            return VERBS[verb].read(objects, returned)

        return call, objects, expected

    return Odd(f"{verb}({parameter}={what})", make)


def odd_inputs() -> Iterator[Odd]:
    """Yield all combinations of parameters (including the data) and values."""
    for verb, function in FUNCTIONS.items():
        first, *rest = inspect.signature(function).parameters
        rest += chain.from_iterable(map(fields_of, KINDS.values())) if verb == "train" else ()
        rest += fields_of(hg.Design) if verb == "biomarkers" else []
        for parameter in rest:
            if parameter not in FREE:
                for what in VALUES:
                    yield _odd(verb, parameter, what)
        for what in VALUES:
            yield _data(verb, what)


def _data(verb: str, what: str) -> Odd:
    def make() -> tuple[Callable[[], Any], list[Any], Any]:
        kwargs = arguments(verb)
        # For verbs of many objects, the list itself or one of its items may be odd.
        return lambda: FUNCTIONS[verb](VALUES[what], **kwargs), [], None

    return Odd(f"{verb}(first argument={what})", make)
