"""Verbs for odd inputs, with their results as plain values."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

import he2gene_sc as hg
from tests.helpers.odd.harness import labelled, predicted, tiny


@dataclass(frozen=True)
class Verb:
    """A verb with its inputs and results.

    Attributes
    ----------
    call
        ``call(objects, **kwargs)``.
    inputs
        Function that makes its objects.
    read
        Function that returns its results as plain values; ``read(objects, returned)``.
    kwargs
        Arguments of the default call.
    """

    call: Callable[..., Any]
    inputs: Callable[[], list[Any]]
    read: Callable[[list[Any], Any], Any]
    kwargs: dict[str, Any] = field(default_factory=dict)


def _slide() -> list[Any]:
    return [labelled(0)]


def _masked() -> list[Any]:
    sdata = labelled(0)
    hg.pp.tissue(sdata)
    return [sdata]


def _done() -> list[Any]:
    return [predicted()]


def _cohort() -> list[Any]:
    return [labelled(seed)["table"] for seed in range(4)]


@cache
def _half() -> np.ndarray:
    return np.arange(30) % 2 == 0


def _written(objects: list[Any], _: Any) -> dict[str, Any]:
    """Return numeric layers and columns of ``var`` and ``obs`` that the package wrote."""
    found = {}
    for number, each in enumerate(objects):
        table = each["table"] if hasattr(each, "tables") else each
        for slot in ("layers", "obsm", "obs", "var"):
            holder = getattr(table, slot)
            for key in list(holder):
                if "he2gene" in str(key):
                    value = holder[key]
                    value = value.astype(str) if getattr(value, "dtype", None) == "category" else value
                    found[f"{number} {slot} {key}"] = np.asarray(value)
    return found


def _of(*ends: str) -> Callable[[list[Any], Any], Any]:
    """Make a reader of written entries whose names have these endings."""

    def read(objects: list[Any], returned: Any) -> dict[str, Any]:
        return {key: value for key, value in _written(objects, returned).items() if key.endswith(ends)}

    return read


def _record(key: str, frame: str) -> Callable[[list[Any], Any], Any]:
    def read(objects: list[Any], _: Any) -> Any:
        table = objects[0]["table"] if hasattr(objects[0], "tables") else objects[0]
        return table.uns[key][frame]

    return read


def _figure(objects: list[Any], _: Any) -> str:
    import matplotlib.pyplot as plt

    plt.close("all")
    return "drawn"


def _one(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(objects: list[Any], **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return function(objects[0], **kwargs)

    return call


def _card(_: list[Any], model: Any) -> dict[str, Any]:
    return {"genes": list(model.genes.index), "weight": np.asarray(model.tensors["genes.weight"], float)}


#: Dataclasses that are arguments of `train`.
KINDS: dict[str, Any] = {
    "preset": hg.DefaultRecipe,
    "keys": hg.SectionKeys,
    "classes": hg.Classes,
    "genes": hg.GeneSelection,
    "card": hg.CardText,
}


def fields_of(kind: Any) -> list[str]:
    return [field.name for field in fields(kind) if field.name not in (*KINDS, "merge")]


def _train(objects: list[Any], **kwargs: Any) -> Any:
    for parameter, kind in KINDS.items():
        own = {name: kwargs.pop(name) for name in fields_of(kind) if name in kwargs}
        if own:
            kwargs[parameter] = kind(**own)
    return hg.tl.train(objects, **kwargs)


def _biomarkers(objects: list[Any], **kwargs: Any) -> Any:
    own = {name: kwargs.pop(name) for name in fields_of(hg.Design) if name in kwargs}
    return hg.tl.biomarkers(objects, **kwargs, **({"design": hg.Design(**own)} if own else {}))


CONTRAST = {"groupby": "pathologist", "groups": "tumour", "reference": "stroma"}

#: Verbs that read a table, by name.
VERBS = {
    "predict": Verb(_one(hg.tl.predict), _slide, _written, {"model": None}),
    "embed": Verb(_one(hg.tl.embed), _slide, _written, {"model": None}),
    "evaluate": Verb(
        _one(hg.tl.evaluate),
        _done,
        _record("he2gene_eval", "genes"),
        {"model": None, "annotation_key": "annotation", "baselines": ["mean colour"], "n_splits": 2},
    ),
    "intervals": Verb(
        _one(hg.tl.intervals), _done, _of("_lower", "_upper", "_halfwidth", "_rarely_detected"), {"model": None}
    ),
    "adapt": Verb(_one(hg.tl.adapt), _done, _of("_adapted", "_gain"), {"measured": _half()}),
    "domain_preservation": Verb(
        _one(hg.tl.domain_preservation),
        _done,
        _record("he2gene_domains", "table"),
        {
            "domain_key": "pathologist",
            "genes": ["ERBB2", "EPCAM", "COL1A1", "VIM", "MKI67", "ADIPOQ"],
            "clustering": "kmeans",
            "n_perms": 19,
            "n_seeds": 2,
        },
    ),
    "biomarkers": Verb(_biomarkers, _cohort, lambda _, result: result, {**CONTRAST, "layer": None}),
    "concordance": Verb(
        _one(hg.tl.concordance),
        _done,
        _record("he2gene_concordance", "table"),
        {**CONTRAST, "method": "wilcoxon", "k": (3, 5)},
    ),
    "train": Verb(
        _train,
        lambda: [labelled(0), labelled(1)],
        _card,
        {"annotation_key": "annotation", "encoder": None, "show_progress_bar": False},
    ),
    "tissue": Verb(_one(hg.pp.tissue), _slide, lambda o, _: {"labels": sorted(o[0].labels)}),
    "grid": Verb(_one(hg.pp.grid), _masked, lambda o, _: {"shapes": sorted(o[0].shapes)}, {"key_added": "grid"}),
    "get.genes": Verb(_one(hg.get.genes), _done, lambda _, result: list(result), {"reliable": False}),
    "get.predicted": Verb(_one(hg.get.predicted), _done, lambda _, result: result.to_df(), {"reliable": False}),
    "pl.spatial": Verb(_one(hg.pl.spatial), _done, _figure, {"genes": ["ERBB2", "COL1A1"]}),
    "pl.annotation": Verb(_one(hg.pl.annotation), _done, _figure),
}


def arguments(name: str) -> dict[str, Any]:
    """Return the arguments of the default call, with the tiny model if a model is needed."""
    encoder, model = tiny()
    kwargs = dict(VERBS[name].kwargs)
    if "model" in kwargs:
        kwargs["model"] = model
    if "encoder" in kwargs:
        kwargs["encoder"] = encoder
    return kwargs


@cache
def clean(name: str) -> Any:
    """Return the result of the default call on clean input."""

    import warnings

    verb = VERBS[name]
    objects = verb.inputs()
    with warnings.catch_warnings(action="ignore"):
        returned = verb.call(objects, **arguments(name))
    return verb.read(objects, returned)
