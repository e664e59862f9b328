"""The paper's training and test patients of HBCIS, and their samples in HEST-1k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class PatientSplit:
    """Training patients and test patients.

    Attributes
    ----------
    train, test
        Names of patients; no patient is in both.
    hest_ids
        Ids of their samples in HEST-1k, by patient; empty if they are not in HEST-1k.
    hest_her2st
        Ids of the samples of her2st in HEST-1k, on which the paper tests without retraining.

    Raises
    ------
    ValueError
        If a patient is named twice.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    hest_ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    hest_her2st: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        both = self.train + self.test
        twice = sorted({patient for patient in both if both.count(patient) > 1})
        if twice:
            raise ValueError(f"patients {twice} are named twice; a split has to name each patient once")

    @property
    def patients(self) -> tuple[str, ...]:
        """All patients, sorted by name."""
        return tuple(sorted(self.train + self.test))

    @property
    def hest_train(self) -> tuple[str, ...]:
        """Ids in HEST-1k of the samples of the training patients."""
        return self._ids_of(self.train)

    @property
    def hest_test(self) -> tuple[str, ...]:
        """Ids in HEST-1k of the samples of the test patients."""
        return self._ids_of(self.test)

    def _ids_of(self, patients: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for patient in patients for name in self.hest_ids.get(patient, ()))


#: First sample in HEST-1k of each patient of HBCIS, from the table of HEST (``HEST_v1_1_0.csv``). The sections of a patient
#: are consecutive; all patients have three, except BC23901, which has two.
_FIRST_IN_HEST = {
    "BC23209": 60,
    "BC23268": 87,
    "BC23269": 84,
    "BC23270": 75,
    "BC23272": 81,
    "BC23277": 72,
    "BC23287": 116,
    "BC23288": 57,
    "BC23377": 54,
    "BC23450": 113,
    "BC23506": 69,
    "BC23508": 66,
    "BC23567": 102,
    "BC23803": 51,
    "BC23810": 99,
    "BC23895": 63,
    "BC23901": 111,
    "BC23903": 96,
    "BC23944": 108,
    "BC24044": 93,
    "BC24105": 90,
    "BC24220": 105,
    "BC24223": 78,
}
_TEST = ("BC23268", "BC23287", "BC23377", "BC23508", "BC23903")

#: The paper's split of HBCIS. The five test patients, one of each subtype, are those in HE2Gene's training script
#: (``he2gene_base.py``), which trains on all others of the 23 patients; public loaders of the set (TRIPLEX, SPARED) agree on
#: the 23.
HE2GENE_SPLIT = PatientSplit(
    train=tuple(patient for patient in _FIRST_IN_HEST if patient not in _TEST),
    test=_TEST,
    hest_ids={
        patient: tuple(f"SPA{first + i}" for i in range(2 if patient == "BC23901" else 3))
        for patient, first in _FIRST_IN_HEST.items()
    },
    hest_her2st=tuple(f"SPA{i}" for i in range(119, 155)),
)

#: Patients of her2st that are also patients of HBCIS, by the names of their slides: public copies of her2st hold
#: ``HE_BT23567_D2`` (E), ``HE_BT23810_D2`` (F) and ``HE_BT24044_D2`` (H). All three are in the paper's training set. No overlap
#: is known for A (9769), B, C (5714) and D (10426); for G it is unknown.
HER2ST_IN_HBCIS: Mapping[str, str] = MappingProxyType({"E": "BC23567", "F": "BC23810", "H": "BC24044"})
