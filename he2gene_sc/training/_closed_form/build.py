"""Build a model with its card from training sections: compute held-out metrics, then fit to all sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from ..._core.logs import logger
from ...models import HE2Gene
from ...models._embedding import NO_CONTEXT, Context, reciprocal
from ...models._gene_table import REFERENCES
from .._calibrate import calibration_unit, card_entry
from .._figures import annotation_figures, expression_figures, labelled_logits, paired_figures, pooled_temperature
from .._folds import UNIT_LIMITATIONS, grouped_folds, warn_of_unit
from .._held_out import HeldOut, standardise
from .._metadata import ModelMetadata
from .._predictability import MIN_GROUPS, gene_table
from .._programmes import programme_figures
from .._sections import Section, group_codes, groups_of
from .annotation import ANNOTATION_CONTEXT, STRENGTH, fit_annotation
from .heads import Choice, Recipe, find_rings, fit_basis, fit_sums
from .ood import fit_detector
from .validate import cross_validate, panels

#: Most folds; if there are more sections or patients, several are held out together.
MAX_FOLDS = 10
#: Least share of all labels in the training data of a fold whose confidence is taken as that of the model.
_MIN_LABEL_SHARE = 0.2
_HELD_OUT = {"section": "leave one section out", "patient": "leave one patient out", "block": "parts of one section"}


def folds_of(sections: Sequence[Section], unit: str | None, seed: int = 0) -> tuple[str, list[np.ndarray]]:
    """Return the unit, and fold codes ``(n,)`` of the spots of each section.

    Units are ``"patient"``, ``"section"``, ``"block"``, and, for comparison with the paper only, random ``"spot"``. ``None`` is the
    largest unit with several groups.
    """
    if unit == "spot":
        codes = np.random.default_rng(seed).permutation(sum(map(len, sections))) % 5
    else:
        centres = np.concatenate([section.centres_um for section in sections])
        arrays = group_codes(sections, "section"), group_codes(sections, "patient"), centres
        unit, codes = grouped_folds(*arrays, unit=unit)
        if unit != "block":
            _, codes = grouped_folds(*arrays, n_folds=MAX_FOLDS, unit=unit)
    return unit, np.split(codes, np.cumsum([len(section) for section in sections])[:-1])


@threadpool_limits.wrap(limits=1, user_api="blas")
def build_model(
    sections: Sequence[Section],
    metadata: ModelMetadata,
    recipe: Recipe,
    *,
    n_colour: int,
    n_target: int,
    validation: str = "grouped",
    seed: int = 0,
) -> HE2Gene:
    """Choose the penalties, compute held-out metrics and fit the model; weights are in half precision, as stored.

    One thread is used: small steps would wait for each other on a busy machine, and results would depend on the number of cores.
    """
    n_classes = len(metadata.classes)
    unit, folds = folds_of(sections, "spot" if validation == "random" else None, seed)
    warn_of_unit(unit)
    protocols = {unit: folds}
    if unit == "patient":
        protocols = {"section": folds_of(sections, "section")[1], **protocols}
    if unit == "spot":
        logger.warning(
            "validation='random': the neighbours of held-out spots were trained on, so metrics are optimistic; do not report "
            "them as accuracy"
        )
    titles = {name: _protocol(name, codes, sections) for name, codes in protocols.items()}
    find_rings(sections, (recipe.context, ANNOTATION_CONTEXT) if n_classes else (recipe.context,))
    exchangeable = calibration_unit(sections, unit)
    programmes = metadata.programmes
    set_weights = None if programmes is None else programmes.weights
    choice, held_out = cross_validate(
        sections,
        protocols,
        recipe,
        n_classes=n_classes,
        n_target=n_target,
        calibration=exchangeable,
        programmes=set_weights,
    )
    colours = [section.features[:, 0, section.features.shape[2] - n_colour :] for section in sections]
    colour, colour_recipe = _replace_features(sections, colours)
    in_context = _replace_features(sections, colours, replace(recipe.context, fine_below_mpp=None))[1]
    (colour_choice, colour_alone), (_, colour_in_context) = (
        cross_validate(colour, protocols, used, n_classes=0, n_target=n_target, panels_only=True)
        for used in (colour_recipe, in_context)
    )
    references = _references(sections, colours, protocols, n_target, set_weights)
    # A model is used on new patients, so confidence on held-out patients is preferred for calibration.
    can_calibrate = [name for name in protocols if _can_calibrate(sections, protocols[name], held_out[name])]
    calibration_protocol = can_calibrate[-1] if can_calibrate else next(iter(protocols))
    calibration_folds = held_out[calibration_protocol]
    # With two patients, each fold is trained on one patient, whose confidence says little about a model of both.
    is_calibrated = unit != "patient" or len(set(groups_of(sections, "patient"))) >= MIN_GROUPS
    metrics = {}
    # Held-out patients are listed first.
    for name, found in reversed(held_out.items()):
        baselines = {"colour alone": colour_alone[name], "colour with slide and neighbours": colour_in_context[name]}
        metrics[titles[name]] = {
            **expression_figures(sections, found, baselines),
            **paired_figures(sections, found, references[name], unit=name),
            **annotation_figures(
                sections,
                found,
                metadata.classes,
                calibration_folds=calibration_folds,
                exclude_patient=calibration_protocol == "patient",
                is_calibrated=is_calibrated,
            ),
        }
    everything = [np.ones(len(section), bool) for section in sections]
    target, variable = panels(sections, everything, n_target)
    basis = fit_basis(sections, everything, recipe)
    sums = fit_sums(sections, everything, basis, recipe.power)
    tensors = {
        "latent.mean": basis.mean,
        "latent.scale": basis.scale,
        "latent.projection": basis.projection.astype(np.float16),
        "latent.mixing": basis.mixing.astype(np.float16),
        "genes.weight": sums.weights(choice).astype(np.float16),
        "genes.bias": sums.mean.astype(np.float32),
    }
    limitations = metadata.limitations
    if unit in UNIT_LIMITATIONS:
        limitations = (*limitations, f"{UNIT_LIMITATIONS[unit][0].upper()}{UNIT_LIMITATIONS[unit][1:]}.")
    head = fit_annotation(sections, everything, recipe.annotation, n_classes) if n_classes else None
    if head is not None:
        tensors |= head.tensors(pooled_temperature(sections, calibration_folds.logits) if is_calibrated else 1.0)
        if not len(labelled_logits(sections, calibration_folds.logits)[1]):
            logger.warning(
                "annotation: no held-out spot has a label of a class that its fold was trained on, for example because only "
                "one section is annotated: its probabilities are NOT calibrated"
            )
            limitations = (*limitations, "The probabilities of its annotation are not calibrated.")
    tensors |= _fit_colour(colour, everything, colour_recipe, colour_choice, np.union1d(target, variable))
    genes, rule = gene_table(sections, metadata, held_out, references, target, variable)
    programme_facts = None
    if programmes is not None and unit == "patient":
        programme_facts = programme_figures(programmes, sections, held_out[unit], references[unit], seed)
    elif programmes is not None:
        logger.warning(
            "programmes: predictions of gene sets are only tested on held-out patients, so the card has no metrics of them"
        )
    intervals = None
    if exchangeable is not None:
        calibration = held_out[exchangeable].calibration
        assert calibration is not None
        tensors |= calibration.tensors()
        intervals = card_entry(calibration, exchangeable, metadata.classes)
    px, tiled = metadata.encoder.input_px, metadata.tiles is not None
    detector_tensors, limits = fit_detector(sections, recipe.weights, metadata.windows_um, px, n_colour, tiled=tiled)
    tensors |= detector_tensors
    without_rings: dict[str, float | None] = {}
    if choice.without_rings is not None:
        without_rings["penalty_without_neighbours"] = choice.without_rings.penalty
        without_rings["rank_without_neighbours"] = choice.without_rings.rank
    card = metadata.card(
        genes,
        tensors,
        training={
            "preset": "default",
            **metadata.spots(sections, [len(s) for s in sections], np.concatenate([s.codes for s in sections])),
            "chosen_by": f"{' and '.join(titles.values())}, the folds that the figures are of",
            "penalty": choice.penalty,
            "rank": choice.rank,
            **without_rings,
            "annotation_strength": STRENGTH,
            "recoloured_copies": max(len(section.recoloured) for section in sections) if head is not None else 0,
            "colour_penalty": colour_choice.penalty,
            "colour_rank": colour_choice.rank,
            "intervals": "bootstrap over blocks of tissue within sections (none below five), conditional on these patients",
        },
        metrics=metrics,
        reliable_rule=rule,
        limitations=limitations,
        context=recipe.context.to_dict(),
        intervals=intervals,
        guard=limits,
        annotation=None if head is None else {"context": ANNOTATION_CONTEXT.to_dict()},
        programmes=programme_facts,
    )
    # C order, as in the stored file, since rounding depends on it.
    return HE2Gene(card, genes, {key: np.asarray(value, order="C") for key, value in tensors.items()})


def _can_calibrate(sections: Sequence[Section], folds: Sequence[np.ndarray], held_out: HeldOut) -> bool:
    """Return whether held-out spots have labels, and every fold was trained on enough of all labels."""
    labelled = np.concatenate([section.codes for section in sections]) >= 0
    held = np.bincount(np.concatenate(list(folds))[labelled])
    _, usable = labelled_logits(sections, held_out.logits)
    return len(usable) > 0 and held.max() <= (1 - _MIN_LABEL_SHARE) * labelled.sum()


def _protocol(unit: str, folds: Sequence[np.ndarray], sections: Sequence[Section]) -> str:
    """Name the protocol of the folds, for the card."""
    if unit == "spot":
        return "random spots of the same sections (leaks; for comparison with the paper only)"
    n_folds = len(np.unique(np.concatenate(list(folds))))
    groups = set(groups_of(sections, "patient")) if unit == "patient" else sections
    return f"{n_folds} folds of whole {unit}s" if unit != "block" and n_folds < len(groups) else _HELD_OUT[unit]


def _replace_features(
    sections: Sequence[Section], values: Sequence[np.ndarray], context: Context = NO_CONTEXT
) -> tuple[list[Section], Recipe]:
    """Replace the features of sections by values of each spot ``(n, f)``, which do not depend on symmetries."""
    f = values[0].shape[1]
    weights = np.full(f, f**-0.5, np.float32)
    recipe = Recipe(weights, n_components=f, n_latent=f * (1 + len(context.rings_um)), context=context)
    reduced = [replace(section, features=x[:, None]) for section, x in zip(sections, values, strict=True)]
    for reduced_section, section in zip(reduced, sections, strict=True):
        reduced_section.rings.update(section.rings)
    return reduced, recipe


def _references(
    sections: Sequence[Section],
    colours: Sequence[np.ndarray],
    protocols: Mapping[str, Sequence[np.ndarray]],
    n_target: int,
    programmes: np.ndarray | None,
) -> dict[str, dict[str, HeldOut]]:
    """Return held-out predictions from depth, colour and coordinates of spots in their section, by protocol and name."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in REFERENCES}
    for section, colour in zip(sections, colours, strict=True):
        xy = standardise(section.centres_um)
        values["depth"].append(standardise(np.log(section.totals)[:, None]))
        values["colour"].append(standardise(colour))
        values["coordinates"].append(np.hstack([xy, standardise(np.square(xy).sum(1, keepdims=True))]))
    found: dict[str, dict[str, HeldOut]] = {protocol: {} for protocol in protocols}
    for name, features in values.items():
        reduced, recipe = _replace_features(sections, features)
        _, held_out = cross_validate(reduced, protocols, recipe, n_classes=0, n_target=n_target, programmes=programmes)
        for protocol, of_protocol in held_out.items():
            found[protocol][name] = of_protocol
    return found


def _fit_colour(
    colour: Sequence[Section], rows: Sequence[np.ndarray], recipe: Recipe, choice: Choice, genes: np.ndarray
) -> dict[str, np.ndarray]:
    """Fit a ridge on colour only, for the genes of both panels."""
    basis = fit_basis(colour, rows, recipe)
    sums = fit_sums(colour, rows, basis, recipe.power)
    to_embedding = reciprocal(basis.scale, basis.scale > 0)[:, None] * (basis.projection @ basis.mixing)
    weight = to_embedding @ sums.weights(choice)[:, genes]
    return {
        "colour.weight": weight.astype(np.float32),
        "colour.bias": (sums.mean[genes] - basis.mean @ weight).astype(np.float32),
        "colour.genes": genes.astype(np.int64),
    }
