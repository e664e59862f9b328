"""Sections for tests of the closed form, with planted features, targets, gaps and labels."""

import numpy as np
import pandas as pd
import scipy.sparse

from he2gene_sc.models import EncoderSpec
from he2gene_sc.models._embedding import Context
from he2gene_sc.stats import pearson
from he2gene_sc.training import ModelMetadata, Recipe, Section, log_targets
from he2gene_sc.training._held_out import Depth

N_FEATURES, N_COLOUR = 12, 4
CONTEXT = Context(((50.0, 250.0), (250.0, 500.0)), (0.7, 0.4), 10.0)


def grid(n, pitch=200.0, width=8):
    order = np.arange(n)
    return pitch * np.stack([order % width, order // width], axis=1).astype(float)


def section(features, counts, *, name="S", patient="P", measured=None, codes=None, centres=None, totals=None):
    n = len(features)
    counts = scipy.sparse.csr_array(counts)
    totals = np.asarray(counts.sum(1), float).ravel() if totals is None else totals
    return Section(
        name=name,
        patient=patient,
        mpp=0.5,
        centres_um=grid(n) if centres is None else centres,
        features=np.asarray(features, np.float32),
        targets=log_targets(counts, totals),
        totals=totals,
        measured=np.ones(counts.shape[1], bool) if measured is None else measured,
        codes=np.full(n, -1) if codes is None else codes,
    )


def planted(n_sections=4, n=60, n_genes=10, views=2, seed=0, noise=0.0, patients=2, gaps=(), n_classes=3):
    """Make sections whose genes and classes depend on the features; ``gaps`` are unmeasured pairs (section, gene)."""
    rng = np.random.default_rng(seed)
    slopes = rng.normal(size=(N_FEATURES, n_genes)) / 4
    separators = rng.normal(size=(N_FEATURES, n_classes))
    sections = []
    for i in range(n_sections):
        truth = rng.normal(size=(n, 1, N_FEATURES))
        features = truth + 0.1 * rng.normal(size=(n, views, N_FEATURES)) + rng.normal(size=N_FEATURES)
        features[:, :, -N_COLOUR:] = features[:, :1, -N_COLOUR:]
        rate = 40 * np.exp(truth[:, 0] @ slopes + noise * rng.normal(size=(n, n_genes)) + rng.normal(size=n_genes) / 3)
        counts = rng.poisson(rate)
        totals = counts.sum(1).astype(float)
        measured = np.array([(i, gene) not in gaps for gene in range(n_genes)])
        counts[:, ~measured] = 0
        sections.append(
            section(
                features,
                counts,
                name=f"S{i}",
                patient=f"P{i % patients}",
                measured=measured,
                codes=(truth[:, 0] @ separators).argmax(1),
                totals=totals,
            )
        )
    return sections


def recipe(n_components=10, n_latent=8, context=CONTEXT, f=N_FEATURES):
    return Recipe(np.linspace(0.2, 0.5, f).astype(np.float32), n_components, n_latent, context)


def everything(sections):
    return [np.ones(len(s), bool) for s in sections]


def facts(n_genes):
    """Return the metadata of a card."""
    return ModelMetadata(
        genes=pd.Index([f"G{i}" for i in range(n_genes)]),
        ensembl_ids=("",) * n_genes,
        classes=("a", "b", "c"),
        class_colors=("#000000",) * 3,
        encoder=EncoderSpec("tiny"),
        windows_um=(100.0,),
        name="mine",
        version="1",
        description="",
        intended_use="",
        limitations=(),
    )


def held_out_correlations(
    rho, depth=0.0, colour=0.0, coordinates=0.0, *, n_genes=2000, n_patients=3, spots=200, seed=0
):
    """Simulate correlations of genes with a prediction, with it given depth, and with baselines without genes, by patient.

    ``rho`` is the population correlation given depth, of which colour is a part; it varies between patients by 0.1 (Fisher's
    z). The image correlates with depth by 0.7.
    """
    rng = np.random.default_rng(seed)
    share = colour / rho if rho else 0.0
    own, given, alone = [], [], []
    for _ in range(n_patients):
        d, c, place, noise = rng.normal(size=(4, spots, 1))
        pattern = share * c + np.sqrt(1 - share**2) * rng.normal(size=(spots, n_genes))
        of_depth, of_place = (x + 0.05 * rng.normal(size=n_genes) for x in (depth, coordinates))
        true = np.tanh(np.arctanh(rho) + 0.1 * rng.normal(size=n_genes)) * np.sqrt(1 - of_depth**2)
        y = of_depth * d + of_place * place + true * pattern
        y += np.sqrt(1 - of_depth**2 - of_place**2 - true**2) * rng.normal(size=y.shape)
        guess = 0.7 * depth * (0.7 * d + np.sqrt(1 - 0.7**2) * noise) + max(rho, 0.02) * pattern
        by_depth = Depth(np.linalg.qr(d - d.mean(0))[0])
        own.append(pearson(guess, y))
        given.append(by_depth.partial(guess, y))
        alone.append([pearson(np.broadcast_to(x, y.shape), y) for x in (d, c, place)])
    return np.array(own), np.array(given), np.moveaxis(np.array(alone), 1, 0)
