"""Toy sections of several patients, and an encoder that is small enough to train on them in a second."""

from dataclasses import fields
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

import he2gene_sc as hg
from he2gene_sc.models import EncoderSpec

SPEC = EncoderSpec("tiny-own", input_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()


class Power(nn.Module):
    """Network whose weights and ``repr`` do not identify its function."""

    def __init__(self, inner, power):
        super().__init__()
        self.inner, self.power = inner, power

    def forward(self, x):
        return self.inner(x).abs() ** self.power


def own():
    return network(), SPEC


def toy(i, patient="A", *, shape=(5, 6), **obs):
    """Make section ``S<i>`` of a patient; ``obs`` are columns to set."""
    sdata = hg.datasets.toy(shape, mpp=2.0, seed=i)
    table = sdata["table"]
    for key, value in {"section": f"S{i}", "patient": patient, **obs}.items():
        table.obs[key] = value
    return sdata


def toys(patients="ABA"):
    return [toy(i, patient) for i, patient in enumerate(patients)]


def with_table(sdata, table):
    """Replace the table by one of the same spots."""
    from spatialdata.models import TableModel

    attrs = sdata["table"].uns["spatialdata_attrs"]
    table.uns.pop("spatialdata_attrs", None)
    del sdata.tables["table"]
    sdata.tables["table"] = TableModel.parse(
        table, region=attrs["region"], region_key=attrs["region_key"], instance_key=attrs["instance_key"]
    )
    return sdata


def without_genes(sdata, genes):
    table = sdata["table"]
    return with_table(sdata, table[:, ~table.var_names.isin(genes)].copy())


def renamed(sdata, names):
    """Rename genes by a mapping."""
    table = sdata["table"]
    table.var_names = pd.Index([names.get(gene, gene) for gene in table.var_names])
    return sdata


def arguments(**options):
    """Make arguments of `hg.tl.train`; fields of its dataclasses may be passed by name."""
    preset = options.get("preset", "default")
    kinds: dict = {"keys": hg.SectionKeys, "genes": hg.GeneSelection, "card": hg.CardText}
    kinds["preset"] = hg.DefaultRecipe if preset == "default" else partial(hg.PaperRecipe, preset)
    for parameter, kind in kinds.items():
        known = {field.name for field in fields(getattr(kind, "func", kind))} - {"name"}
        own = {name: options.pop(name) for name in known & options.keys()}
        if own.keys() - {"genes"}:
            options[parameter] = kind(**own)
        else:
            options |= own
    return options


def train(sections, **options):
    """Train a toy model, by default with one recoloured copy of each section."""
    options = {"encoder": own(), "annotation_key": "annotation", "device": "cpu"} | options
    if options.get("preset", "default") == "default":
        options.setdefault("n_recoloured", 1)
    return hg.tl.train(sections, **arguments(**options))


def predicted(sdata, model, **options):
    return hg.tl.predict(sdata, model=model, copy=True, device="cpu", **options)["table"]


def same_model(a, b):
    assert a.tensors.keys() == b.tensors.keys()
    for key, value in a.tensors.items():
        np.testing.assert_array_equal(value, b.tensors[key], err_msg=key)
    pd.testing.assert_frame_equal(a.genes, b.genes)
    assert a.card.metrics == b.card.metrics
    assert a.card.training == b.card.training
