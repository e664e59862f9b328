"""Which patients of HBCIS the paper trained on, which it tested on, and which of them her2st holds too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PatientSplit:
    """Patients to train on and patients to test on.

    Attributes
    ----------
    train, test
        Names of patients; no patient is in both.

    Raises
    ------
    ValueError
        If a patient is named twice.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        both = self.train + self.test
        twice = sorted({patient for patient in both if both.count(patient) > 1})
        if twice:
            raise ValueError(f"patients {twice} are named twice: a split holds each patient once")

    @property
    def patients(self) -> tuple[str, ...]:
        """All patients, in the order of their names."""
        return tuple(sorted(self.train + self.test))


#: The paper's split of HBCIS. The five test patients, one of each subtype, stand in HE2Gene's training script
#: (``he2gene_base.py``), which trains on all others of the 23; the 23 are those that public loaders of the set list
#: (TRIPLEX, SPARED), in agreement with each other.
HE2GENE_SPLIT = PatientSplit(
    train=(
        "BC23209",
        "BC23269",
        "BC23270",
        "BC23272",
        "BC23277",
        "BC23288",
        "BC23450",
        "BC23506",
        "BC23567",
        "BC23803",
        "BC23810",
        "BC23895",
        "BC23901",
        "BC23944",
        "BC24044",
        "BC24105",
        "BC24220",
        "BC24223",
    ),
    test=("BC23268", "BC23287", "BC23377", "BC23508", "BC23903"),
)

#: Patients of her2st that are patients of HBCIS too, by the names of their slides: public copies of her2st hold
#: ``HE_BT23567_D2`` (E), ``HE_BT23810_D2`` (F) and ``HE_BT24044_D2`` (H). All three are in the paper's training set. Nothing of
#: the kind is known of A (9769), C (5714) and D (10426) and B; of G it is not known.
HER2ST_IN_HBCIS: Mapping[str, str] = MappingProxyType({"E": "BC23567", "F": "BC23810", "H": "BC24044"})
