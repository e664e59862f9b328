"""``hg.datasets.her2st``: load sections of HER2-positive breast tumours (Andersson et al., Nat Commun 2021)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.logs import logger
from .._settings import settings
from ..io._st import UnmatchedSpots, read_labels, read_st
from ..io._text import read_table

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Sections of the public repository.
HER2ST_SECTIONS: tuple[str, ...] = tuple(
    f"{patient}{i}" for patient, n in zip("ABCDEFGH", (6, 6, 6, 6, 3, 3, 3, 3), strict=True) for i in range(1, n + 1)
)

_REPOSITORY = "https://raw.githubusercontent.com/almaan/her2st"
#: Commit and folder in the public repository, by the first folder of a file name here (other files: ``data``).
_REMOTE = {
    "app": "47b2e34be3bacfb7564095859c6a6003c26765d9/backup/app/www/imgs",
    "data": "9f2260c6aa8347996955d53f0a5f06ac14c93470/data",
    "ST-cluster": "5ef75b9530d59eff0965ad104672e75a7f0e2023/res",
}
#: Width and height of the downscaled images, in array positions.
_REDUCED_FRAME = (32, 34)


def her2st(section: str) -> SpatialData:
    """Load one section of her2st.

    Files are taken from ``hg.settings.data_dir`` or ``HE2GENE_DATA_DIR`` (the folder above ``her2st``, which may be a
    clone of the public repository), else from the download cache, else downloaded from the public repository and checked
    by SHA-256.

    Parameters
    ----------
    section
        ``"A1"`` to ``"H3"``, see :data:`he2gene_sc.datasets.HER2ST_SECTIONS`.

    Returns
    -------
    spatialdata.SpatialData
        Image ``"he"`` (multiscale, uint8; missing if only counts are available), shapes ``"spots"`` (100 µm circles),
        table ``"table"``: raw counts in ``X`` (sparse), ``obsm["spatial"]``, and in ``obs``

        - ``array_row``, ``array_col``, ``patient``, ``section``;
        - ``pathologist``: the pathologist's label, missing in sections without annotation;
        - ``annotation``: the best label for training: the pathologist's, else the transferred consensus;
        - ``annotation_source``: ``"pathologist"`` or ``"transferred"``;
        - ``label_warp``: the label of the nearest spot of the annotated adjacent section. The label does not use
          expression, so it can be used for evaluation. Prefer ``pathologist``.

        Transferred labels are derived data: they are only included if the local folder has ``ST-pat/lbl_transferred``.

    Raises
    ------
    ValueError
        If the section is unknown.
    FileNotFoundError
        If files are found neither locally nor online; the message lists them and all places that were searched.

    Notes
    -----
    Without the full-resolution image, A1 and A2 use the downscaled copy of the authors' app, which has a black background
    and an inset in the upper right corner. It was aligned to the patient's first section before downscaling; the spots
    are aligned in the same way, by the authors' aligned coordinates (``ST-cluster``).

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> hg.datasets.her2st("C5")["table"].obs["section"].unique().tolist()
    ['C5']
    """
    validate.arguments(her2st, locals())
    if section not in HER2ST_SECTIONS:
        raise ValueError(f"`section` {section!r} is unknown, valid: {', '.join(HER2ST_SECTIONS)}")
    counts, spots = _fetch([f"ST-cnts/{section}.tsv.gz", f"ST-spotfiles/{section}_selection.tsv"])
    folder = f"{_folder(section)}/"
    registered = (name for name in _registry() if name.startswith(folder) or name == _reduced_image(section))
    image = local_image(section) or _find(next(registered, ""))
    spot_table = read_table(spots)
    if image is not None and image.suffix == ".png":
        spot_table = _downscaled_spots(spot_table, image, section)
    if image is None:
        logger.info("her2st %s: no image was found; the object has counts, spots and labels", section)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sdata = read_st(counts, spot_table, image, section=section, patient=section[0])
    for warning in caught:
        # The published files differ in their spots, so log this warning only.
        if issubclass(warning.category, UnmatchedSpots):
            logger.info("%s", warning.message)
        else:
            warnings.warn(warning.message, warning.category, stacklevel=2)
    obs = sdata["table"].obs
    empty = pd.Series(np.nan, index=obs.index, dtype=object)
    pathologist = _find(f"ST-pat/lbl/{section}_labeled_coordinates.tsv")
    transferred = _local(f"ST-pat/lbl_transferred/{section}_transferred.tsv")
    own = empty if pathologist is None else read_labels(pathologist).reindex(obs.index)
    consensus = empty if transferred is None else read_labels(transferred).reindex(obs.index)
    warped = empty if transferred is None else read_labels(transferred, "label_warp").reindex(obs.index)
    best = own.where(own.notna(), consensus)
    source = pd.Series(np.where(own.notna(), "pathologist", "transferred"), index=obs.index, dtype=object)
    obs["pathologist"] = pd.Categorical(own)
    obs["annotation"] = pd.Categorical(best)
    obs["annotation_source"] = pd.Categorical(source.where(best.notna()))
    obs["label_warp"] = pd.Categorical(warped)
    return sdata


def _downscaled_spots(spots: pd.DataFrame, image: Path, section: str) -> pd.DataFrame:
    """Return spot centres in the authors' downscaled image, which shows the array from position 1 on.

    Images were aligned to the first section before downscaling; spots are aligned by the same motion, estimated from the
    aligned coordinates of their clusters (none for A1; 5.5° and two spots for A2).
    """
    from PIL import Image

    (clusters,) = _fetch([f"ST-cluster/lbl/{section}-cluster-annotation.tsv.gz"])
    aligned = read_table(clusters, index_col=0)
    before = np.column_stack([aligned[["pixel_x", "pixel_y"]], np.ones(len(aligned))])
    motion = np.linalg.lstsq(before, aligned[["warped_x", "warped_y"]].to_numpy(), rcond=None)[0]
    centres = np.column_stack([spots[["pixel_x", "pixel_y"]], np.ones(len(spots))]) @ motion
    with Image.open(image) as opened:
        size = opened.size
    out = spots.copy()
    for i, axis in enumerate(("x", "y")):
        # Full-resolution pixels per array position; the downscaled image has size / frame.
        full = np.polyfit(spots[f"new_{axis}"], spots[f"pixel_{axis}"], 1)[0]
        out[f"pixel_{axis}"] = centres[:, i] / full * size[i] / _REDUCED_FRAME[i]
    return out


def local_image(section: str) -> Path | None:
    """Return the image of a section in a local folder, preferably at full resolution; ``None`` if there is none."""
    for root in _local_roots():
        # The second layout is that of the image archive on Zenodo.
        for files_there in ((root / _folder(section)).glob("*"), (root / "images" / "HE").glob(f"{section}.*")):
            found = sorted(p for p in files_there if p.suffix.lower() in {".jpg", ".jpeg", ".tif"})
            if found:
                return found[0]
    return _local(_reduced_image(section))


def _folder(section: str) -> str:
    return f"ST-imgs/{section[0]}/{section}"


def _reduced_image(section: str) -> str:
    return f"app/{section}_HE_image_dark.png"


def _registry() -> dict[str, str]:
    text = Path(__file__).with_name("her2st_sha256.txt").read_text(encoding="utf-8")
    return {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}


def _local_roots() -> list[Path]:
    """Return folders that may hold ``ST-cnts`` and other data: the data folder, or a clone of the public repository."""
    data_dir = settings.resolved_data_dir()
    if data_dir is None:
        return []
    clone = data_dir / "her2st"
    return [clone, clone / "data", clone / "res", clone / "backup" / "app" / "www" / "imgs", data_dir]


def _local(name: str) -> Path | None:
    places = (root / path for root in _local_roots() for path in (name, name.removeprefix("app/")))
    return next((place for place in places if place.is_file()), None)


def _find(name: str) -> Path | None:
    """Find a file locally, else in the cache or online if it is registered; ``None`` if there is none."""
    return _fetch([name])[0] if name in _registry() else _local(name)


def _fetch(names: list[str]) -> list[Path]:
    """Find files locally, in the cache or online; raise an error with all missing files and searched places."""
    paths, problems = [], []
    for name in names:
        if (path := _local(name)) is not None:
            paths.append(path)
        elif name not in _registry():
            problems.append(f"{name}: not registered for download")
        else:
            try:
                paths.append(Path(_cache().fetch(name)))
            except (OSError, ValueError) as error:
                problems.append(f"{name}: {_url(name)}: {error}")
    if problems:
        places = [str(root) for root in _local_roots()] or ["no local folder (HE2GENE_DATA_DIR is not set)"]
        raise FileNotFoundError(
            "her2st files not found:\n  "
            + "\n  ".join(problems)
            + f"\nLooked in: {', '.join(places)}; cache {_cache().path}.\n"
            "Set HE2GENE_DATA_DIR (or hg.settings.data_dir) to the folder above a clone of almaan/her2st."
        )
    return paths


def _cache() -> Any:
    import pooch

    return pooch.create(
        path=pooch.os_cache("he2gene_sc") / "her2st",
        base_url="",
        registry={name: f"sha256:{digest}" for name, digest in _registry().items()},
        urls={name: _url(name) for name in _registry()},
        retry_if_failed=1,
    )


def _url(name: str) -> str:
    folder = name.split("/", 1)[0]
    path = name.removeprefix("app/")
    return f"{_REPOSITORY}/{_REMOTE.get(folder, _REMOTE['data'])}/{path}"
