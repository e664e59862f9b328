"""Check the tensors of a model: names, shapes that fit the card, finite values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..stats import TAILS
from ._card import ModelCard
from ._embedding import N_COLOUR
from ._embedding import TENSORS as LATENT
from ._ood import BANK, MEAN, PROJECTION, SCALE, SIZE, WEIGHTS

#: Prefix of the names of the tensors of an encoder.
ENCODER = "encoder."
_GENES = ("genes.weight", "genes.bias")
_ANNOTATION = ("annotation.weight", "annotation.bias")
_COLOUR = ("colour.weight", "colour.bias", "colour.genes")
_INTERVALS = ("intervals.quantiles", "intervals.groups", "intervals.spread")
#: Only in models trained with he2gene_sc 0.7 or later.
DETECTED = ("intervals.detected", "intervals.detected_groups")
LEVELS = ("intervals.level_quantiles", "intervals.level_groups", "intervals.level_edges")
_OWN_ANNOTATION = ("annotation.mean", "annotation.scale", "annotation.projection")
#: Tensors of the detector in all models, and further ones since 0.7 (in 0.6 it was standardised like the embedding).
_GUARD, _OWN_GUARD = (PROJECTION, BANK, SIZE), (MEAN, SCALE, WEIGHTS)
_INTEGERS = ("colour.genes", "intervals.groups", DETECTED[1], LEVELS[1])
_NOT_NEGATIVE = (
    *("latent.scale", "annotation.scale", SCALE, WEIGHTS, "intervals.groups", DETECTED[1], LEVELS[1]),
    *("intervals.quantiles", DETECTED[0]),
)
#: NaN if a class or a predicted level has too few spots; infinite if a level has too few groups. For each: the tensor that counts
#: the groups, and the index, in both, of the part of all spots together.
_MAY_BE_NOT_FINITE: dict[str, tuple[str, Any, Any]] = {
    "intervals.quantiles": ("intervals.groups", 0, 0),
    DETECTED[0]: (DETECTED[1], ..., ...),
    LEVELS[0]: (LEVELS[1], np.s_[:, 0], 0),
}
_MAX_LISTED = 5

#: Shape of a tensor; ``None`` is any number.
_Shape = tuple[int | None, ...]


def check_tensors(card: ModelCard, tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Check names, types, shapes and finite values of tensors against the card; ``where`` names the file in errors."""
    _check_names(card, tensors, where)
    for name, values in tensors.items():
        _check_values(name, values, where)
    for name, (shape, reason) in _expected_shapes(card, tensors).items():
        found = tensors[name].shape
        if len(found) != len(shape) or any(n is not None and n != m for n, m in zip(shape, found, strict=True)):
            valid = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"{where}: tensor {name!r} has shape {found}; ({valid}) is needed for {reason}")
    f, windows = len(tensors.get("latent.mean", ())), len(card.windows_um)
    if "latent.mean" in tensors and card.fusion == "concat" and (f <= _n_colour(card) or f % windows):
        raise ValueError(
            f"{where}: tensor 'latent.mean' has {f} features, which are not those of {windows} windows "
            f"(`windows_um`), each with {N_COLOUR} colours"
        )
    chosen = tensors.get("colour.genes")
    if chosen is not None and chosen.size and (chosen.min() < 0 or chosen.max() >= card.n_genes):
        raise ValueError(f"{where}: tensor 'colour.genes' holds positions outside the {card.n_genes} genes")
    if BANK in tensors and not len(tensors[BANK]):
        raise ValueError(f"{where}: tensor {BANK!r} holds no spot")
    for name, (groups, pooled, counted) in _MAY_BE_NOT_FINITE.items():
        if name in tensors and np.isnan(tensors[name][pooled][..., tensors[groups][counted] > 0]).any():
            raise ValueError(f"{where}: tensor {name!r} holds values that are missing")


def _check_names(card: ModelCard, tensors: Mapping[str, np.ndarray], where: str) -> None:
    needed = set(_GENES)
    for group, is_needed in (
        (LATENT, any(name in tensors for name in LATENT) or card.context is not None or card.guard is not None),
        (_ANNOTATION, bool(card.classes)),
        (_COLOUR, any(name in tensors for name in _COLOUR)),
        (_INTERVALS, card.intervals is not None),
        (DETECTED, card.intervals is not None and any(name in tensors for name in DETECTED)),
        (LEVELS, card.intervals is not None and any(name in tensors for name in LEVELS)),
        (_GUARD, card.guard is not None),
        (_OWN_GUARD, card.guard is not None and "rest" in card.guard),
        (_OWN_ANNOTATION, card.annotation is not None),
    ):
        needed |= set(group) if is_needed else set()
    heads = {name for name in tensors if not name.startswith(ENCODER)}
    if lacking := sorted(needed - heads):
        raise ValueError(
            f"{where} lacks {lacking[:_MAX_LISTED]}: it is not a he2gene_sc model of this schema, or is damaged"
        )
    if unknown := sorted(heads - needed):
        raise ValueError(f"{where} holds {unknown[:_MAX_LISTED]}, which its card does not mention: it is damaged")


def _check_values(name: str, values: np.ndarray, where: str) -> None:
    is_integer = name in _INTEGERS
    kinds = "iu" if is_integer else "fiu" if name.startswith(ENCODER) else "f"
    if values.dtype.kind not in kinds:
        wanted = "whole numbers" if is_integer else "floating-point numbers"
        raise ValueError(f"{where}: tensor {name!r} is of type {values.dtype}; {wanted} are needed")
    if values.dtype.kind == "f" and name not in _MAY_BE_NOT_FINITE and not np.isfinite(values).all():
        n = int((~np.isfinite(values)).sum())
        raise ValueError(
            f"{where}: tensor {name!r} holds {n:,} values that are not finite: its training diverged, or it is damaged"
        )
    if name in _NOT_NEGATIVE and (values < 0).any():
        raise ValueError(f"{where}: tensor {name!r} holds negative values")


def _expected_shapes(card: ModelCard, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[_Shape, str]]:
    """Return the shape of each tensor that follows from the card and from other tensors, and the reason."""

    def axis(name: str, number: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        return shape[number] if len(shape) > number else 0

    g, k, c, f = card.n_genes, card.n_latent, len(card.classes), axis("latent.mean", 0)
    genes, latent = f"{g} genes (`n_genes`)", f"{k} components (`n_latent`)"
    features, classes = f"{f} features, as in 'latent.mean'", f"{c} classes and {latent}"
    p, rings = axis("latent.projection", 1), len((card.context or {}).get("rings_um", ()))
    annotation: tuple[_Shape, str] = ((k, c), classes)
    if card.annotation is not None:
        own_p, own_rings = axis("annotation.projection", 1), len(card.annotation["context"]["rings_um"])
        reason = f"{own_p} components of the annotation, {own_rings} rings and {c} classes"
        annotation = ((own_p * (1 + own_rings), c), reason)
    windows, coloured = len(card.windows_um), axis("colour.weight", 1)
    levels, n = len((card.intervals or {}).get("levels", ())), axis(LEVELS[1], 0)
    by_level = f"{n - 1} predicted levels and {genes}"
    d, n_colour = axis(PROJECTION, 1), _n_colour(card)
    encoded, bank_colours = max(0, f - n_colour) // windows, 0 if "rest" in (card.guard or {}) else n_colour
    has_size = windows > 1 and "tiles" not in card.encoder
    shapes: dict[str, tuple[_Shape, str]] = {
        "genes.weight": ((k, g), f"{latent} and {genes}"),
        "genes.bias": ((g,), genes),
        "latent.mean": ((None,), "the features"),
        **dict.fromkeys(("annotation.mean", "annotation.scale", "latent.scale", *_OWN_GUARD), ((f,), features)),
        **dict.fromkeys(("annotation.projection", "latent.projection", PROJECTION), ((f, None), features)),
        "annotation.weight": annotation,
        "annotation.bias": ((c,), classes),
        "latent.mixing": ((p * (1 + rings), k), f"{p} components, {rings} rings and {latent}"),
        "colour.weight": ((N_COLOUR * windows, None), f"the colour of {windows} windows"),
        "colour.bias": ((coloured,), "the genes of 'colour.weight'"),
        "colour.genes": ((coloured,), "the genes of 'colour.weight'"),
        "intervals.quantiles": ((1 + c, levels, g), f"{c} classes, {levels} levels and {genes}"),
        "intervals.groups": ((1 + c, g), f"{c} classes and {genes}"),
        "intervals.spread": ((2, g), genes),
        DETECTED[0]: ((levels, g), f"{levels} levels and {genes}"),
        DETECTED[1]: ((g,), genes),
        LEVELS[0]: ((2, n, len(TAILS), g), by_level),
        LEVELS[1]: ((n, g), by_level),
        LEVELS[2]: ((max(n - 2, 0), g), by_level),
        BANK: ((None, d + bank_colours), f"{d} components and {bank_colours} colours"),
        SIZE: ((encoded + 1 if has_size else 0,), f"{encoded} features of a window"),
    }
    return {name: wanted for name, wanted in shapes.items() if name in tensors}


def _n_colour(card: ModelCard) -> int:
    """Return the number of colour features of a spot: 0 if every window is a view."""
    return N_COLOUR * len(card.windows_um) if card.fusion == "concat" else 0
