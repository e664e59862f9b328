"""All names of keys that are written into a SpatialData object."""

from __future__ import annotations

import re
from collections.abc import Collection
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
    """Key of a slot that is derived from ``key_added``; with ``head``, only models with that head write it."""

    def __init__(self, slot: str, pattern: str, head: str | None = None) -> None:
        self.slot, self.pattern, self.head = slot, pattern, head

    def __get__(self, keys: Keys, owner: type[Keys]) -> str:
        return self.pattern.format(keys.key_added)


@dataclass(frozen=True)
class Keys:
    """Keys that one ``predict`` run writes, derived from its ``key_added``."""

    key_added: str = "he2gene"
    layer_name: str | None = None

    # Whether the model knows the gene; its held-out Pearson correlation.
    predicted = _KeyPattern("var", "{}_predicted")
    pcc = _KeyPattern("var", "{}_pcc")
    # Mean correlation over held-out patients; the same, given the counts of each spot.
    pcc_new_patient = _KeyPattern("var", "{}_pcc_new_patient")
    pcc_given_depth = _KeyPattern("var", "{}_pcc_given_depth")
    # Whether the gene is reliable for a new patient, and for another section of a training patient.
    reliable = _KeyPattern("var", "{}_reliable")
    reliable_known_patient = _KeyPattern("var", "{}_reliable_known_patient")
    # Mean in training, the reference for skill.
    mean = _KeyPattern("var", "{}_mean")
    # Most probable class, missing for unknown spots, and its calibrated probability.
    annotation = _KeyPattern("obs", "{}_annotation", "classes")
    confidence = _KeyPattern("obs", "{}_annotation_confidence", "classes")
    # Distance from the training data (above 1: out of distribution); fraction of tissue.
    ood = _KeyPattern("obs", "{}_ood", "ood")
    tissue = _KeyPattern("obs", "{}_tissue")
    # The embedding that the heads read; probability of every class, a DataFrame.
    embedding = _KeyPattern("obsm", "X_{}")
    proba = _KeyPattern("obsm", "{}_annotation_proba", "classes")
    # Digests of the rows of the embedding; colours of the classes, as in scanpy.
    rows = _KeyPattern("uns", "X_{}_rows")
    colors = _KeyPattern("uns", "{}_annotation_colors", "classes")

    @property
    def layer(self) -> str:
        """``.layers``: predicted expression."""
        return self.layer_name or self.key_added

    @property
    def uns(self) -> str:
        """``.uns``: record of the run."""
        return self.key_added

    def written(self, heads: Collection[str] = ("classes", "ood")) -> dict[str, list[str]]:
        """Return the keys that ``hg.tl.predict`` writes beside its record, by slot, with a model with these heads."""
        found = {"layers": [self.layer]}
        for pattern in vars(Keys).values():
            if isinstance(pattern, _KeyPattern) and (pattern.head is None or pattern.head in heads):
                found.setdefault(pattern.slot, []).append(pattern.__get__(self, Keys))
        return found


def check_key(name: str, parameter: str) -> None:
    """Raise for a key that ``SpatialData.write`` would reject after the work is done."""
    if not isinstance(name, str) or not _VALID.fullmatch(name) or name.startswith(("__", ".")):
        raise ValueError(
            f"`{parameter}` {name!r} cannot be stored: use letters, digits, '_', '.' and '-' only, "
            "not starting with '.' or '__' (for example 'he2gene')"
        )
