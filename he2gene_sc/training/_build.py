"""From training arrays to a model with its card: held-out figures first, then the fit on everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..models import EncoderSpec, HE2Gene, ModelCard
from ._closed_form import fit_basis, temperature
from ._validate import HeldOut, TrainingSet, cross_validate, panels

#: Lower bound of the held-out correlation above which a gene may be called reliable.
RELIABLE_PCC = 0.1
_N_DIGITS = 4


@dataclass(frozen=True)
class Facts:
    """What the arrays do not say.

    Attributes
    ----------
    section_names, patient_names, mpps
        One a section, in the order of the codes of the training set; patients by section.
    genes
        Names of the targets.
    ensembl_ids
        Symbol to Ensembl id.
    classes, class_colors
        Names of the codes, and colours.
    encoder, encoder_sha256
        The frozen encoder.
    windows_um
        Sides of the windows, µm.
    name, version, description, intended_use, limitations
        For the card.
    """

    section_names: tuple[str, ...]
    patient_names: tuple[str, ...]
    mpps: tuple[float, ...]
    genes: pd.Index
    ensembl_ids: dict[str, str]
    classes: tuple[str, ...]
    class_colors: tuple[str, ...]
    encoder: EncoderSpec
    encoder_sha256: str
    windows_um: tuple[float, ...]
    name: str
    version: str
    description: str
    intended_use: str
    limitations: tuple[str, ...]


def build_model(data: TrainingSet, facts: Facts, *, n_target: int, n_latent: int, colour_share: float) -> HE2Gene:
    """Validate, fit and describe a model.

    Parameters
    ----------
    data
        Training spots.
    facts
        Names and descriptions.
    n_target
        Number of target genes.
    n_latent
        Length of the embedding.
    colour_share
        Weight of the colour statistics, as a share of that of the encoder's features.

    Returns
    -------
    he2gene_sc.models.HE2Gene
        Weights in half precision, as they are stored.
    """
    n_classes = len(facts.classes)
    options = {"n_target": n_target, "colour_share": colour_share}
    penalty, strength, held_out = cross_validate(data, data.sections, n_classes=n_classes, n_latent=n_latent, **options)
    colour = data.colour_only()
    colour_penalty, _, colour_held_out = cross_validate(
        colour, data.sections, n_classes=0, n_latent=data.n_colour, **options
    )
    metrics = {"leave one section out": _figures(held_out, colour_held_out, facts, data, n_target)}
    if len(set(facts.patient_names)) > 1:
        fixed = {"penalties": (penalty,), "strengths": (strength,)}
        _, _, across = cross_validate(data, data.patients, n_classes=n_classes, n_latent=n_latent, **options, **fixed)
        _, _, colour_across = cross_validate(
            colour, data.patients, penalties=(colour_penalty,), n_classes=0, n_latent=data.n_colour, **options
        )
        metrics["leave one patient out"] = _figures(across, colour_across, facts, data, n_target)
    tensors = _fit(data, penalty, strength, held_out, n_classes, n_latent, colour_share)
    target, variable = panels(data.targets, data.sections, n_target)
    shown = np.union1d(target, variable)
    tensors |= _fit_colour(colour, colour_penalty, shown)
    genes = _gene_table(data, facts, held_out, target, variable)
    card = ModelCard(
        name=facts.name,
        version=facts.version,
        description=facts.description,
        encoder={
            "name": facts.encoder.name,
            "license": facts.encoder.license,
            "sha256": facts.encoder_sha256,
            "input_px": facts.encoder.input_px,
        },
        windows_um=facts.windows_um,
        classes=facts.classes,
        class_colors=facts.class_colors,
        n_genes=len(genes),
        n_latent=int(tensors["latent.projection"].shape[1]),
        training=_training(data, facts, penalty, strength, colour_penalty),
        metrics=metrics,
        reliable_rule=(
            f"the lower 95 % bound of its held-out Pearson correlation (t over the {len(facts.section_names)} sections, "
            f"each held out in turn) is above {RELIABLE_PCC} and its held-out skill against the training mean is "
            "positive"
        ),
        intended_use=facts.intended_use,
        limitations=facts.limitations,
    )
    return HE2Gene(card, genes, tensors)


def _fit(
    data: TrainingSet,
    penalty: float,
    strength: float,
    held_out: HeldOut,
    n_classes: int,
    n_latent: int,
    colour_share: float,
) -> dict[str, np.ndarray]:
    heads = data.basis(n_latent, colour_share).ridge(penalty)
    tensors = {
        "latent.mean": heads.mean,
        "latent.scale": heads.scale,
        "latent.projection": heads.projection.astype(np.float16),
        "genes.weight": heads.weight.astype(np.float16),
        "genes.bias": heads.bias.astype(np.float32),
    }
    labelled = np.flatnonzero(data.codes >= 0)
    if n_classes and len(labelled):
        weight, bias = data.softmax(heads, n_classes, strength)
        t = temperature(held_out.logits[labelled], data.codes[labelled])
        tensors["annotation.weight"] = (weight / t).astype(np.float32)
        tensors["annotation.bias"] = (bias / t).astype(np.float32)
    return tensors


def _fit_colour(colour: TrainingSet, penalty: float, genes: np.ndarray) -> dict[str, np.ndarray]:
    """Ridge on nothing but colour, for the genes that are shown beside it."""
    heads = fit_basis(
        colour.features,
        colour.targets[:, genes],
        colour.sections,
        n_latent=colour.n_colour,
        n_colour=0,
        colour_share=0.0,
    ).ridge(penalty)
    return {
        "colour.weight": (heads.projection / heads.scale[:, None] @ heads.weight).astype(np.float32),
        "colour.bias": (heads.bias - heads.mean / heads.scale @ heads.projection @ heads.weight).astype(np.float32),
        "colour.genes": genes.astype(np.int64),
    }


def _figures(held_out: HeldOut, colour: HeldOut, facts: Facts, data: TrainingSet, n_target: int) -> dict[str, object]:
    """Figures of one protocol, per held-out section; never a mean over patients with an interval."""
    names = [facts.section_names[s] for s in held_out.sections]

    def by_section(values: np.ndarray) -> dict[str, float]:
        return {name: round(float(v), _N_DIGITS) for name, v in zip(names, values, strict=True)}

    figures: dict[str, object] = {
        f"mean Pearson, {n_target} target genes": by_section(held_out.panel),
        "the same, colour alone (target genes)": by_section(colour.panel),
        "mean Pearson, 50 genes most variable within sections": by_section(held_out.variable),
        "the same, colour alone (variable genes)": by_section(colour.variable),
    }
    labelled = np.flatnonzero(data.codes >= 0)
    if len(facts.classes) and len(labelled):
        from sklearn.metrics import recall_score

        rows = {s: labelled[data.sections[labelled] == s] for s in held_out.sections}
        figures["balanced accuracy of the annotation"] = {
            facts.section_names[s]: round(
                float(
                    recall_score(
                        data.codes[r], held_out.logits[r].argmax(1), labels=np.unique(data.codes[r]), average="macro"
                    )
                ),
                _N_DIGITS,
            )
            for s, r in rows.items()
            if len(np.unique(data.codes[r])) > 1
        }
    return figures


def _training(
    data: TrainingSet, facts: Facts, penalty: float, strength: float, colour_penalty: float
) -> dict[str, object]:
    spots = np.bincount(data.sections, minlength=len(facts.section_names))
    labels = np.bincount(data.codes[data.codes >= 0], minlength=len(facts.classes))
    return {
        "sections": {
            name: {"patient": patient, "n_spots": int(n), "mpp": round(mpp, 4)}
            for name, patient, n, mpp in zip(facts.section_names, facts.patient_names, spots, facts.mpps, strict=True)
        },
        "n_patients": len(set(facts.patient_names)),
        "n_spots": int(spots.sum()),
        "labelled_spots": {name: int(n) for name, n in zip(facts.classes, labels, strict=True)},
        "penalty": penalty,
        "annotation_strength": strength,
        "colour_penalty": colour_penalty,
        "chosen_by": "leave one section out",
    }


def _gene_table(
    data: TrainingSet, facts: Facts, held_out: HeldOut, target: np.ndarray, variable: np.ndarray
) -> pd.DataFrame:
    from scipy.stats import t

    # A gene that is constant in a section was not predicted there: it counts as 0.
    pcc = np.nan_to_num(held_out.pcc)
    n = len(pcc)
    mean, sd = pcc.mean(0), pcc.std(0, ddof=1)
    low = mean - t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    index = np.arange(len(facts.genes))
    return pd.DataFrame(
        {
            "ensembl_id": [facts.ensembl_ids.get(gene, "") for gene in facts.genes],
            "group": np.where(np.isin(index, target), "target", "auxiliary"),
            "variable": np.isin(index, variable),
            "mean": data.targets.mean(0, dtype=np.float64),
            "pcc": mean,
            "pcc_low": low,
            "skill": held_out.skill,
            "reliable": (low > RELIABLE_PCC) & (held_out.skill > 0),
        },
        index=pd.Index(facts.genes, name="gene"),
    )
