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
        if twice := sorted({patient for patient in both if both.count(patient) > 1}):
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


#: Patients of HBCIS (without "BC") in the order of their samples in HEST-1k, SPA51 to SPA118 (``HEST_v1_1_0.csv``).
_ORDER_IN_HEST = (
    "23803 23377 23288 23209 23895 23508 23506 23277 23270 24223 23272 23269 "
    "23268 24105 24044 23903 23810 23567 24220 23944 23901 23450 23287"
)
#: Patient of each of these samples: three of every patient, two of BC23901.
_SAMPLES = [f"BC{n}" for n in _ORDER_IN_HEST.split() for _ in range(2 if n == "23901" else 3)]
_TEST = ("BC23268", "BC23287", "BC23377", "BC23508", "BC23903")

#: The paper's split of HBCIS. The five test patients, one of each subtype, are those in HE2Gene's training script
#: (``he2gene_base.py``), which trains on all others of the 23 patients; public loaders of the set (TRIPLEX, SPARED) agree on
#: the 23.
HE2GENE_SPLIT = PatientSplit(
    train=tuple(patient for patient in sorted(set(_SAMPLES)) if patient not in _TEST),
    test=_TEST,
    hest_ids={
        patient: tuple(f"SPA{51 + i}" for i, other in enumerate(_SAMPLES) if other == patient)
        for patient in sorted(set(_SAMPLES))
    },
    hest_her2st=tuple(f"SPA{i}" for i in range(119, 155)),
)

#: Patients of her2st that are also patients of HBCIS, by the names of their slides: public copies of her2st hold
#: ``HE_BT23567_D2`` (E), ``HE_BT23810_D2`` (F) and ``HE_BT24044_D2`` (H). All three are in the paper's training set. No overlap
#: is known for A (9769), B, C (5714) and D (10426); for G it is unknown.
HER2ST_IN_HBCIS: Mapping[str, str] = MappingProxyType({"E": "BC23567", "F": "BC23810", "H": "BC24044"})
