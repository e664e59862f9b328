"""Odd tables: unusual counts, labels, names, coordinates and predictions, in every verb."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from tests.helpers.odd.harness import Odd
from tests.helpers.odd.verbs import VERBS, arguments, clean

#: Verbs whose table is changed, with the index of the changed object.
WHO = ("predict", "evaluate", "intervals", "adapt", "domain_preservation", "biomarkers", "concordance", "train")
ALSO = ("get.genes", "get.predicted", "pl.spatial", "pl.annotation")


def _x(change: Callable[[np.ndarray], Any]) -> Callable[[Any], None]:
    def apply(table: Any) -> None:
        table.X = change(table.X.toarray().astype(np.float64))

    return apply


def _with(values: np.ndarray, value: float, where: tuple[int, int] = (3, 2)) -> np.ndarray:
    values[where] = value
    return values


def _rate(values: np.ndarray, total: float) -> np.ndarray:
    return values / values.sum(1, keepdims=True) * total


def _column(name: str, change: Callable[[pd.Series], Any]) -> Callable[[Any], None]:
    def apply(table: Any) -> None:
        column = table.obs[name].astype(object)
        made = change(column)
        table.obs[name] = made if isinstance(made, pd.Series) else pd.Series(made, index=table.obs_names)

    return apply


def _some(value: Any, every: int = 3) -> Callable[[pd.Series], pd.Series]:
    def change(column: pd.Series) -> pd.Series:
        column = column.copy()
        column.iloc[::every] = value
        return column

    return change


def _first(change: Callable[[Any], Any]) -> Callable[[pd.Series], pd.Series]:
    def apply(column: pd.Series) -> pd.Series:
        column = column.copy()
        column.iloc[0] = change(column.iloc[0])
        return column

    return apply


def _names(slot: str, change: Callable[[list[str]], list[Any]]) -> Callable[[Any], None]:
    def apply(table: Any) -> None:
        setattr(table, slot, pd.Index(change(list(getattr(table, slot)))))

    return apply


def _spatial(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    def apply(table: Any) -> None:
        table.obsm["spatial"] = change(np.asarray(table.obsm["spatial"], float).copy())

    return apply


def _dask(values: np.ndarray) -> Any:
    import dask.array as da

    return da.from_array(values, chunks=(7, 9))


#: Unusual formats of the same numbers, which have to be read.
HARMLESS = {
    "counts are int64": _x(lambda v: v.astype(np.int64)),
    "counts are uint16": _x(lambda v: v.astype(np.uint16)),
    "counts are float32": _x(lambda v: v.astype(np.float32)),
    "counts are dense": _x(lambda v: v),
    "counts are in Fortran order": _x(np.asfortranarray),
    "counts are csc": _x(scipy.sparse.csc_matrix),
    "counts are a sparse array": _x(scipy.sparse.csr_array),
    "counts are csr with stored zeros": _x(lambda v: _stored_zeros(v)),
    "obs has a column of dates": lambda t: t.obs.insert(0, "day", pd.Timestamp("2026-01-01")),
    "obs has a column of lists as text": lambda t: t.obs.insert(0, "list", "[1, 2]"),
    "obs has a nullable column": lambda t: t.obs.insert(0, "n", pd.array([None] * t.n_obs, dtype="Int64")),
    "var has a numeric column named 0": lambda t: t.var.insert(0, "0", 1.0),
    "uns holds an entry of somebody else": lambda t: t.uns.update({"pca": {"params": {"layer": "x"}}}),
    "obsm holds a PCA": lambda t: t.obsm.update({"X_pca": np.zeros((t.n_obs, 3))}),
    "obsp holds a graph": lambda t: t.obsp.update({"g": scipy.sparse.eye(t.n_obs, format="csr")}),
    "raw is set": lambda t: setattr(t, "raw", t),
    "patients are a categorical with an unused class": lambda t: t.obs.__setitem__(
        "patient", pd.Categorical(t.obs["patient"].astype(str), [*dict.fromkeys(t.obs["patient"].astype(str)), "P9"])
    ),
    "patients are nullable text": lambda t: t.obs.__setitem__("patient", t.obs["patient"].astype("string")),
    "labels are plain text": lambda t: _labels(t, lambda c: c.astype(str)),
    "labels are nullable text": lambda t: _labels(t, lambda c: c.astype("string")),
    "labels have an unused class": lambda t: _labels(t, lambda c: c.astype("category").cat.add_categories(["unused"])),
    "labels end in a blank": lambda t: _labels(t, lambda c: c.astype(str) + " "),
}

#: Wrong tables: a call without warnings has to give the result of the clean table, else it has to warn or raise.
HARMFUL = {
    "a count is NaN": _x(lambda v: _with(v, np.nan)),
    "a row of counts is NaN": _x(lambda v: _with(v, np.nan, (3, slice(None)))),
    "a column of counts is NaN": _x(lambda v: _with(v, np.nan, (slice(None), 2))),
    "a count is infinite": _x(lambda v: _with(v, np.inf)),
    "a count is negative": _x(lambda v: _with(v, -4.0)),
    "a count is a fraction": _x(lambda v: _with(v, 2.5)),
    "a sparse count is NaN": _x(lambda v: scipy.sparse.csr_matrix(_with(v, np.nan))),
    "all counts are 0": _x(np.zeros_like),
    "all counts are NaN": _x(lambda v: np.full_like(v, np.nan)),
    "counts are halved": _x(lambda v: v / 2),
    "counts are rates per 10,000": _x(lambda v: _rate(v, 1e4)),
    "counts are rates per million": _x(lambda v: _rate(v, 1e6)),
    "counts are logarithms": _x(np.log1p),
    "counts are log rates per 10,000": _x(lambda v: np.log1p(_rate(v, 1e4))),
    "counts are log rates per million": _x(lambda v: np.log1p(_rate(v, 1e6))),
    "counts are log2 rates": _x(lambda v: np.log2(1 + _rate(v, 1e4))),
    "counts are scaled to unit variance": _x(lambda v: (v - v.mean(0)) / (v.std(0) + 1e-9)),
    "counts are objects": lambda t: setattr(t, "X", t.X.toarray().astype(object)),
    "counts are true or false": _x(lambda v: v > 2),
    "counts are complex": _x(lambda v: v + 1j),
    "there are no counts": lambda t: setattr(t, "X", None),
    "patients are missing in part": _column("patient", _some(np.nan)),
    "patients are the text nan in part": _column("patient", _some("nan")),
    "patients are the text None in part": _column("patient", _some("None")),
    "patients are <NA> in part": _column("patient", _some(pd.NA)),
    "patients are blank in part": _column("patient", _some("  ")),
    "all patients are missing": _column("patient", lambda c: [np.nan] * len(c)),
    "patients differ in case": _column("patient", _some("p0")),
    "a patient ends in a blank": _column("patient", _first(lambda v: f"{v} ")),
    "a patient has two blanks inside": _column("patient", _first(lambda v: f"{v}  b")),
    "patients are numbers and texts": _column("patient", lambda c: [1.0 if i % 2 else "1" for i in range(len(c))]),
    "patients are fractions": _column("patient", lambda c: [0.5 * i for i in range(len(c))]),
    "patients are dates": _column("patient", lambda c: pd.Series(pd.Timestamp("2026-01-01"), index=c.index)),
    "there is no column of patients": lambda t: t.obs.__delitem__("patient"),
    "sections are missing in part": _column("section", _some(np.nan)),
    "sections differ in case": _column("section", _some("s0")),
    "labels are missing in part": lambda t: _labels(t, _some(np.nan)),
    "labels are the text nan in part": lambda t: _labels(t, _some("nan")),
    "labels are the text None in part": lambda t: _labels(t, _some("None")),
    "labels are blank in part": lambda t: _labels(t, _some("")),
    "labels differ in case in part": lambda t: _labels(t, _some("Tumour")),
    "all labels are missing": lambda t: _labels(t, lambda c: [np.nan] * len(c)),
    "all labels are one": lambda t: _labels(t, lambda c: ["tumour"] * len(c)),
    "labels are fractions": lambda t: _labels(t, lambda c: list(np.linspace(0, 1, len(c)))),
    "labels are lists": lambda t: _labels(t, lambda c: [["tumour"]] * len(c)),
    "there is no column of labels": lambda t: [t.obs.__delitem__(key) for key in ("pathologist", "annotation")],
    "a gene stands twice": _names("var_names", lambda n: [n[1], *n[1:]]),
    "a gene has no name": _names("var_names", lambda n: ["", *n[1:]]),
    "a gene is called nan": _names("var_names", lambda n: ["nan", *n[1:]]),
    "genes are numbers": _names("var_names", lambda n: list(range(len(n)))),
    "no gene is known": _names("var_names", lambda n: [f"x{i}" for i in range(len(n))]),
    "genes are in lower case": _names("var_names", lambda n: [name.lower() for name in n]),
    "genes end in a blank": _names("var_names", lambda n: [f"{name} " for name in n]),
    "genes have versions": _names("var_names", lambda n: [f"{name}.1" for name in n]),
    "genes are of the mouse": _names("var_names", lambda n: [name.title() for name in n]),
    "spot names stand twice": _names("obs_names", lambda n: [n[1], *n[1:]]),
    "spot names are numbers": _names("obs_names", lambda n: list(range(len(n)))),
    "coordinates are NaN in part": _spatial(lambda xy: _with(xy, np.nan, (3, 0))),
    "coordinates are infinite in part": _spatial(lambda xy: _with(xy, np.inf, (3, 0))),
    "coordinates are all the same": _spatial(lambda xy: np.zeros_like(xy)),
    "coordinates lie on a line": _spatial(lambda xy: xy * [1, 0]),
    "coordinates have one column": _spatial(lambda xy: xy[:, :1]),
    "coordinates have three columns": _spatial(lambda xy: np.c_[xy, xy[:, 0]]),
    "two spots lie on each other": _spatial(lambda xy: _with(xy, xy[4], (3, slice(None)))),
    "there are no coordinates": lambda t: t.obsm.__delitem__("spatial"),
    "instance ids stand twice": _column("instance_id", lambda c: [c.iloc[1], *c.iloc[1:]]),
    "instance ids are missing in part": _column("instance_id", _some(np.nan)),
    "instance ids are numbers": _column("instance_id", lambda c: list(range(len(c)))),
    "instance ids are moved by one": _column("instance_id", lambda c: [*c.iloc[1:], c.iloc[0]]),
    "the region is another": _column("region", lambda c: ["elsewhere"] * len(c)),
    "nothing is annotated": lambda t: t.uns.__delitem__("spatialdata_attrs"),
    "the attrs of the region are a text": lambda t: t.uns.__setitem__("spatialdata_attrs", "spots"),
}

#: Predictions that were changed after predict; only for verbs that read one.
BROKEN = {
    "the prediction is NaN in a row": lambda t: t.layers["he2gene"].__setitem__(3, np.nan),
    "the prediction is NaN": lambda t: t.layers["he2gene"].fill(np.nan),
    "the prediction is infinite in part": lambda t: t.layers["he2gene"].__setitem__((3, 2), np.inf),
    "the prediction is constant": lambda t: t.layers["he2gene"].fill(1.0),
    "the layer is gone": lambda t: t.layers.__delitem__("he2gene"),
    "the record is gone": lambda t: t.uns.__delitem__("he2gene"),
    "the record is a text": lambda t: t.uns.__setitem__("he2gene", "predicted"),
    "the record is empty": lambda t: t.uns.__setitem__("he2gene", {}),
    "the record names another layer": lambda t: t.uns["he2gene"].__setitem__("layer", "other"),
    "the record is of another model": lambda t: t.uns["he2gene"].__setitem__("weights_sha256", "0" * 64),
    "the flags of the genes are gone": lambda t: t.var.__delitem__("he2gene_predicted"),
    "the flags of the genes are texts": lambda t: t.var.__setitem__("he2gene_predicted", "True"),
    "the flags of the genes are NaN": lambda t: t.var.__setitem__("he2gene_reliable", np.nan),
    "the annotation is gone": lambda t: t.obs.__delitem__("he2gene_annotation"),
    "the annotation is missing in part": lambda t: t.obs["he2gene_annotation"].__setitem__(slice(0, 5), np.nan),
    "the probabilities are gone": lambda t: t.obsm.__delitem__("he2gene_annotation_proba"),
    "the colours are gone": lambda t: t.uns.__delitem__("he2gene_annotation_colors"),
    "the embedding is gone": lambda t: t.obsm.__delitem__("X_he2gene"),
}


def _stored_zeros(values: np.ndarray) -> scipy.sparse.csr_matrix:
    sparse = scipy.sparse.csr_matrix(values + 1)
    sparse.data -= 1
    return sparse


def _labels(table: Any, change: Callable[[pd.Series], Any]) -> None:
    for key in ("pathologist", "annotation"):
        column = table.obs[key]
        made = change(column.astype(object))
        if not isinstance(made, pd.Series):
            made = pd.Series(made, index=table.obs_names)
        table.obs[key] = made


#: Right results that differ from those of clean input, with the reason.
MEANT = {
    ("predict", "a gene stands twice"): "both columns get the prediction of the gene whose name they bear",
    ("predict", "instance ids are moved by one"): "each row gets the prediction of the spot that it names",
    ("train", "instance ids are moved by one"): "each row has the counts of the spot that it names",
    ("intervals", "a gene stands twice"): "both columns get the interval of the gene whose name they bear",
    ("get.genes", "a gene stands twice"): "the name stands for both columns",
    ("biomarkers", "labels are missing in part"): "spots without a label are in no group",
    ("concordance", "labels are missing in part"): "spots without a label are in no group",
    ("evaluate", "labels are missing in part"): "spots without a label are not judged",
    ("domain_preservation", "labels are missing in part"): "spots without a label are not judged",
    **{
        (verb, what): "it is a gene of that name, which the model does not know"
        for verb in WHO
        for what in ("a gene is called nan", "a gene has no name")
        if (verb, what) != ("train", "a gene has no name")
    },
    ("get.predicted", "the prediction is constant"): "it returns the layer as it stands",
    ("adapt", "the annotation is missing in part"): "spots without a class are corrected as the classes together allow",
    ("adapt", "the prediction is constant"): "what was measured is taken, and the gain says how much it helps",
    ("intervals", "the prediction is NaN in a row"): "there is no interval where nothing was predicted",
    ("adapt", "the prediction is NaN in a row"): "nothing is adapted where nothing was predicted",
    ("train", "labels are missing in part"): "spots without a label do not train the annotation",
}
#: Odd tables that have to give the same result as another table.
LIKE = {
    **dict.fromkeys(
        ("labels are the text nan in part", "labels are the text None in part", "labels are blank in part"),
        "labels are missing in part",
    ),
    **dict.fromkeys(
        (
            "patients are the text nan in part",
            "patients are the text None in part",
            "patients are <NA> in part",
            "patients are blank in part",
        ),
        "patients are missing in part",
    ),
    "a sparse count is NaN": "a count is NaN",
}


@cache
def _answer(verb: str, what: str) -> Any:
    """Return the result of a verb on an odd table; the default result if it raises."""
    objects = VERBS[verb].inputs()
    HARMFUL[what](objects[0]["table"] if hasattr(objects[0], "tables") else objects[0])
    try:
        return VERBS[verb].read(objects, VERBS[verb].call(objects, **arguments(verb)))
    except (ValueError, TypeError):
        return clean(verb)


def _odd(verb: str, what: str, change: Callable[[Any], Any], harmless: bool) -> Odd:
    def make() -> tuple[Callable[[], Any], list[Any], Any]:
        objects = VERBS[verb].inputs()
        first = objects[0]["table"] if hasattr(objects[0], "tables") else objects[0]
        change(first)
        kwargs = arguments(verb)
        expected = _answer(verb, LIKE[what]) if what in LIKE else clean(verb)

        def call() -> Any:
            returned = VERBS[verb].call(objects, **kwargs)
            return expected if (verb, what) in MEANT else VERBS[verb].read(objects, returned)

        return call, objects, expected

    return Odd(f"{verb} / {what}", make, harmless)


def odd_inputs() -> Iterator[Odd]:
    """Yield all combinations of verbs and tables."""
    for verb in WHO:
        for what, change in HARMLESS.items():
            yield _odd(verb, what, change, True)
        for what, change in HARMFUL.items():
            yield _odd(verb, what, change, False)
    for verb in ("evaluate", "intervals", "adapt", "domain_preservation", "concordance", *ALSO):
        for what, change in BROKEN.items():
            yield _odd(verb, what, change, False)
    for verb in ALSO:
        for what in (
            "a gene stands twice",
            "coordinates are NaN in part",
            "spot names stand twice",
            "genes are numbers",
        ):
            yield _odd(verb, what, HARMFUL[what], False)
