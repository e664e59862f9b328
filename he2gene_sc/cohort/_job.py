"""A slide of a cohort: where it lies, where its prediction goes, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: ``sdata.attrs["he2gene"][SOURCE]``: the slide that a store was made from, unless it was updated in place.
SOURCE = "source"
#: ``uns[key][FILES]``: digest of the files of image and spots, by region, in a store that was updated in place.
FILES = "files"


@dataclass(frozen=True)
class Job:
    """A slide to predict, with its options."""

    path: Path  # SpatialData store or H&E image
    output: Path  # store to write, absolute
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of tl.predict, without the model
    labels: Mapping[str, str] = field(default_factory=dict)  # columns of obs with one value: patient, section
    pitch_um: float = 100.0
    tissue_method: str = "auto"
    keep_image: bool = True
    overwrite: bool = False  # replace another store at output, or changes that others saved to path

    @property
    def in_place(self) -> bool:
        """Whether the store of the slide itself is updated."""
        from .._core.stores import resolved

        return self.path.is_dir() and self.output == resolved(self.path)

    @property
    def key(self) -> str:
        """Key of the prediction."""
        return str(self.options.get("key_added") or "he2gene")

    def has_same_options(self, other: Job) -> bool:
        """Whether two jobs have the same options and labels."""
        ours, theirs = ((job.options, job.labels, job.pitch_um, job.tissue_method) for job in (self, other))
        return ours == theirs

    @property
    def source(self) -> dict[str, Any]:
        """Identification of the slide, by which a store made from it is recognised; empty for an update in place."""
        from .._core.stores import digest, resolved

        if self.in_place:
            return {}
        place = resolved(self.path)
        if place.is_dir():
            return {"path": str(place), "files": digest(place)}
        stat = place.stat()
        return {
            "path": str(place),
            "bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
            "pitch_um": float(self.pitch_um),
            "tissue_method": self.tissue_method,
        }


def output_of(path: Path, folder: Path | None = None) -> Path:
    """Return the default output of a prediction: the store itself, a store beside the image, or a store in ``folder``."""
    from .._core.stores import resolved

    place = path if path.is_dir() else path.with_suffix(".zarr")
    return resolved(place if folder is None else folder / f"{path.stem}.zarr")


def elements_of(store: Path, record: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return image and spots in a store for each region of a prediction."""
    shapes, images = record["shapes"], record["image"]
    found = {}
    for region in [shapes] if isinstance(shapes, str) else map(str, shapes):
        image = str(images[region] if isinstance(images, Mapping) else images)
        spots = "labels" if (store / "labels" / region).is_dir() else "shapes"
        found[region] = [("images", image), (spots, region)]
    return found
