"""Every name that is written into a SpatialData object, made in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Image, spots and table as our own readers and datasets call them.
IMAGE = "he"
SPOTS = "spots"
TABLE = "table"
REGION = "region"
INSTANCE = "instance_id"
COORDINATE_SYSTEM = "global"
#: Columns of ``obs`` with the patient and the section, unless others are named.
PATIENT = "patient"
SECTION = "section"

#: ``sdata.attrs[ATTRS]["mpp"][image_key]``: µm per pixel of level 0, written by our readers, read by ``_core/mpp.py``.
ATTRS = "he2gene"
#: ``table.uns[OWN_TABLE]``: marks a table that we made, which is no candidate when a measured table has to be found.
OWN_TABLE = "he2gene_made"

#: ``table.uns[SPATIAL]``: image whose pixels ``obsm["spatial"]`` is in, where predict wrote it.
SPATIAL = "he2gene_spatial"
#: Entries of ``table.uns["he2gene"]`` that differ between the regions of a table.
REGION_FACTS = ("image", "coordinate_system", "level", "mpp", "mpp_source", "n_spots", "n_outside")

#: What the zarr stores of spatialdata accept as the name of an element or key.
_VALID = re.compile(r"[A-Za-z0-9_.-]+")


class _Named:
    """A key that is named after ``key_added``."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __get__(self, keys: Keys, owner: type[Keys]) -> str:
        return self.pattern.format(keys.key_added)


@dataclass(frozen=True)
class Keys:
    """The keys that one ``predict`` run writes, from its ``key_added``."""

    key_added: str = "he2gene"
    layer_name: str | None = None

    #: ``.uns``: what was run on what; colours of the classes, as scanpy keeps them; digests of the rows of the embedding.
    uns = _Named("{}")
    colors = _Named("{}_annotation_colors")
    rows = _Named("X_{}_rows")
    #: ``.var``: whether the model knows the gene; its held-out Pearson correlation; its mean in training, which skill is
    #: measured against.
    predicted = _Named("{}_predicted")
    pcc = _Named("{}_pcc")
    mean = _Named("{}_mean")
    #: ``.var``: whether the gene is good enough to use on a new patient, and on another section of one of training.
    reliable = _Named("{}_reliable")
    reliable_known_patient = _Named("{}_reliable_known_patient")
    #: ``.var``: mean correlation over patients that were held out whole; the same, given the counts of each spot.
    pcc_new_patient = _Named("{}_pcc_new_patient")
    pcc_given_depth = _Named("{}_pcc_given_depth")
    #: ``.obs``: most probable class, missing where it is unknown, and its calibrated probability.
    annotation = _Named("{}_annotation")
    confidence = _Named("{}_annotation_confidence")
    #: ``.obs``: how far a spot is from what the model was trained on, above 1 out of distribution; its share of tissue.
    ood = _Named("{}_ood")
    tissue = _Named("{}_tissue")
    #: ``.obsm``: probability of every class, a DataFrame; the embedding that the heads read.
    proba = _Named("{}_annotation_proba")
    embedding = _Named("X_{}")

    @property
    def layer(self) -> str:
        """``.layers``: predicted expression."""
        return self.layer_name or self.key_added


def check_key(name: str, parameter: str) -> None:
    """Refuse a key that ``SpatialData.write`` would refuse later, after the work is done."""
    if not isinstance(name, str) or not _VALID.fullmatch(name) or name.startswith(("__", ".")):
        raise ValueError(
            f"`{parameter}` {name!r} cannot be stored: use letters, digits, '_', '.' and '-' only, "
            "not starting with '.' or '__' (for example 'he2gene')"
        )
