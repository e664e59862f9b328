"""All names of keys that are written into a SpatialData object."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Names of image, spots and table in objects of our readers and datasets.
IMAGE = "he"
SPOTS = "spots"
TABLE = "table"
REGION = "region"
INSTANCE = "instance_id"
COORDINATE_SYSTEM = "global"
#: Default columns of ``obs`` with the patient and the section.
PATIENT = "patient"
SECTION = "section"

#: ``sdata.attrs[ATTRS]["mpp"][image_key]``: µm per pixel of level 0, written by our readers, read by ``_core/mpp.py``.
ATTRS = "he2gene"
#: ``table.uns[OWN_TABLE]``: marks a table that we made, which is not a candidate for the measured table.
OWN_TABLE = "he2gene_made"

#: ``table.uns[SPATIAL]``: image whose pixels are the unit of ``obsm["spatial"]``, if predict wrote it.
SPATIAL = "he2gene_spatial"
#: Entries of ``table.uns["he2gene"]`` that differ between the regions of a table.
REGION_FACTS = ("image", "coordinate_system", "level", "mpp", "mpp_source", "n_spots", "n_outside")

#: Slots of a table that are aligned to each of its axes, and those that are mappings.
ALIGNED = {"obs": ("obs", "obsm", "obsp", "uns", "layers"), "var": ("var", "varm", "varp", "layers")}
MAPPINGS = ("layers", "obsm", "varm", "obsp", "varp")
SLOTS = ("obs", "var", *MAPPINGS, "uns")
#: Prefix of the dask name of a lazy layer. A digest of its inputs follows, so layers of one name hold the same values.
LAZY = "he2gene-lazy-"

#: Names of elements and keys that zarr stores of spatialdata accept.
_VALID = re.compile(r"[A-Za-z0-9_.-]+")


class _KeyPattern:
    """Key that is derived from ``key_added``."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __get__(self, keys: Keys, owner: type[Keys]) -> str:
        return self.pattern.format(keys.key_added)


@dataclass(frozen=True)
class Keys:
    """Keys that one ``predict`` run writes, derived from its ``key_added``."""

    key_added: str = "he2gene"
    layer_name: str | None = None

    #: ``.uns``: record of the run; colours of the classes, as in scanpy; digests of the rows of the embedding.
    uns = _KeyPattern("{}")
    colors = _KeyPattern("{}_annotation_colors")
    rows = _KeyPattern("X_{}_rows")
    #: ``.var``: whether the model knows the gene; its held-out Pearson correlation; its mean in training, the reference for
    #: skill.
    predicted = _KeyPattern("{}_predicted")
    pcc = _KeyPattern("{}_pcc")
    mean = _KeyPattern("{}_mean")
    #: ``.var``: whether the gene is reliable for a new patient, and for another section of a training patient.
    reliable = _KeyPattern("{}_reliable")
    reliable_known_patient = _KeyPattern("{}_reliable_known_patient")
    #: ``.var``: mean correlation over held-out patients; the same, given the counts of each spot.
    pcc_new_patient = _KeyPattern("{}_pcc_new_patient")
    pcc_given_depth = _KeyPattern("{}_pcc_given_depth")
    #: ``.obs``: most probable class, missing for unknown spots, and its calibrated probability.
    annotation = _KeyPattern("{}_annotation")
    confidence = _KeyPattern("{}_annotation_confidence")
    #: ``.obs``: distance from the training data (above 1: out of distribution); fraction of tissue.
    ood = _KeyPattern("{}_ood")
    tissue = _KeyPattern("{}_tissue")
    #: ``.obsm``: probability of every class, a DataFrame; the embedding that the heads read.
    proba = _KeyPattern("{}_annotation_proba")
    embedding = _KeyPattern("X_{}")

    @property
    def layer(self) -> str:
        """``.layers``: predicted expression."""
        return self.layer_name or self.key_added


def check_key(name: str, parameter: str) -> None:
    """Raise for a key that ``SpatialData.write`` would reject after the work is done."""
    if not isinstance(name, str) or not _VALID.fullmatch(name) or name.startswith(("__", ".")):
        raise ValueError(
            f"`{parameter}` {name!r} cannot be stored: use letters, digits, '_', '.' and '-' only, "
            "not starting with '.' or '__' (for example 'he2gene')"
        )
