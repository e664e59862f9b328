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
#: ``table.uns[MADE]``: marks a table that we made, which is no candidate when a measured table has to be found.
MADE = "he2gene_made"

#: ``table.uns[SPATIAL]``: image whose pixels ``obsm["spatial"]`` is in, where predict wrote it.
SPATIAL = "he2gene_spatial"
#: Entries of ``table.uns["he2gene"]`` that differ between the regions of a table.
FACTS = ("image", "coordinate_system", "level", "mpp", "mpp_source", "n_spots", "n_outside")

#: What the zarr stores of spatialdata accept as the name of an element or key.
_VALID = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Keys:
    """The keys that one ``predict`` run writes, from its ``key_added``."""

    key_added: str = "he2gene"
    layer_name: str | None = None

    @property
    def layer(self) -> str:
        """``.layers``: predicted expression."""
        return self.layer_name or self.key_added

    @property
    def predicted(self) -> str:
        """``.var``: whether the model knows the gene."""
        return f"{self.key_added}_predicted"

    @property
    def pcc(self) -> str:
        """``.var``: held-out Pearson correlation of the gene."""
        return f"{self.key_added}_pcc"

    @property
    def reliable(self) -> str:
        """``.var``: whether the gene is good enough to use on a new patient."""
        return f"{self.key_added}_reliable"

    @property
    def reliable_known_patient(self) -> str:
        """``.var``: whether it is good enough on another section of a patient that the model was trained on."""
        return f"{self.key_added}_reliable_known_patient"

    @property
    def pcc_new_patient(self) -> str:
        """``.var``: mean correlation of the gene over patients that were held out whole."""
        return f"{self.key_added}_pcc_new_patient"

    @property
    def pcc_given_depth(self) -> str:
        """``.var``: the same, given the counts of each spot."""
        return f"{self.key_added}_pcc_given_depth"

    @property
    def mean(self) -> str:
        """``.var``: mean of the gene in training, which skill is measured against."""
        return f"{self.key_added}_mean"

    @property
    def annotation(self) -> str:
        """``.obs``: most probable class; missing where it is unknown."""
        return f"{self.key_added}_annotation"

    @property
    def colors(self) -> str:
        """``.uns``: colours of the classes, as scanpy keeps them."""
        return f"{self.annotation}_colors"

    @property
    def confidence(self) -> str:
        """``.obs``: calibrated probability of the most probable class."""
        return f"{self.key_added}_annotation_confidence"

    @property
    def proba(self) -> str:
        """``.obsm``: probability of every class, a DataFrame."""
        return f"{self.key_added}_annotation_proba"

    @property
    def ood(self) -> str:
        """``.obs``: how far a spot is from what the model was trained on; above 1 it is out of distribution."""
        return f"{self.key_added}_ood"

    @property
    def tissue(self) -> str:
        """``.obs``: share of tissue of a spot."""
        return f"{self.key_added}_tissue"

    @property
    def embedding(self) -> str:
        """``.obsm``: the embedding that the heads read."""
        return f"X_{self.key_added}"

    @property
    def uns(self) -> str:
        """``.uns``: what was run on what."""
        return self.key_added


def check_key(name: str, parameter: str) -> None:
    """Refuse a key that ``SpatialData.write`` would refuse later, after the work is done.

    Raises
    ------
    ValueError
        If the key is empty or has other characters than letters, digits, ``_``, ``.`` and ``-``, or starts with
        ``__`` or a dot.
    """
    if not isinstance(name, str) or not _VALID.fullmatch(name) or name.startswith(("__", ".")):
        raise ValueError(
            f"`{parameter}` {name!r} cannot be stored: use letters, digits, '_', '.' and '-' only, "
            "not starting with '.' or '__' (for example 'he2gene')"
        )
