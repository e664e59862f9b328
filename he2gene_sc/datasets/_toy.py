"""``hg.datasets.toy``: make a synthetic H&E-like slide with planted genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import IMAGE
from ..io._raster import build_levels, image_element
from ..io._st import section_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Classes, in the order of their codes.
CLASSES = ("tumour", "stroma", "adipose")
#: Genes that are planted high in one class, or that follow the density of nuclei ("texture").
PLANTED = {
    "tumour": ("ERBB2", "EPCAM", "KRT19", "KRT8", "CDH1", "CD24", "KRT18", "GRB7"),
    "stroma": ("COL1A1", "COL1A2", "COL3A1", "VIM", "SPARC", "FN1", "DCN", "LUM"),
    "adipose": ("ADIPOQ", "FABP4", "PLIN1", "PLIN4", "LPL", "CD36", "G0S2", "ADH1B"),
    "texture": ("MKI67", "TOP2A", "PCNA", "STMN1", "TUBA1B", "H2AFZ"),
}
_HOUSEKEEPING = ("ACTB", "GAPDH", "B2M", "EEF1A1", "RPL13", "RPS18", "TPT1", "FTL", "UBC", "PPIA")
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
_PITCH_UM, _DIAMETER_UM = 200.0, 100.0


def toy(shape: tuple[int, int] = (12, 12), *, mpp: float = 1.0, seed: int = 0) -> SpatialData:
    """Make a synthetic H&E-like slide.

    Three tissue classes form smooth patches: tumour (crowded dark nuclei), stroma (pink fibres, few nuclei) and adipose
    (white, thin walls). Planted genes depend on the class, or on the density of nuclei at the spot, a texture that varies
    within the classes. The data are synthetic, for tests and offline demos.

    Parameters
    ----------
    shape
        Rows and columns of spots (100 µm circles, 200 µm pitch).
    mpp
        µm per pixel of the image.
    seed
        The same seed gives the same slide.

    Returns
    -------
    spatialdata.SpatialData
        As in :func:`he2gene_sc.datasets.her2st`: image ``"he"``, shapes ``"spots"``, table ``"table"`` with counts in
        ``X``; ``obs["pathologist"]`` and ``obs["annotation"]`` hold the planted class, ``obs["texture"]`` the density
        of nuclei, ``var["planted"]`` the class or texture that a gene depends on.

    Raises
    ------
    ValueError
        If ``shape`` or ``mpp`` is not positive.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> hg.datasets.toy((3, 4))["table"].n_obs
    12
    """
    validate.arguments(toy, locals())
    from scipy.sparse import csr_matrix

    if len(given := validate.names(shape, "shape")) != 2:
        raise ValueError(f"`shape` is {shape!r}; rows and columns of spots are needed, (12, 12) for example")
    rows, columns = (validate.whole_number(n, "shape") for n in given)
    validate.in_range(mpp, "mpp", above=0, most=10, what="a number of µm per pixel")
    rng = np.random.default_rng(seed)
    pitch = _PITCH_UM / mpp
    size = (round((rows + 1) * pitch), round((columns + 1) * pitch))
    # Smooth over about 400 and 250 µm.
    regions = np.argmax([_smooth(rng, size, 400 / mpp) for _ in CLASSES], axis=0)
    density = 1 / (1 + np.exp(-1.5 * _smooth(rng, size, 250 / mpp)))
    image = _paint(rng, regions, density, mpp)
    y, x = (grid.ravel() for grid in np.mgrid[1 : rows + 1, 1 : columns + 1])
    centres = np.column_stack([x, y]) * pitch
    inside = tuple(np.minimum(centres.astype(int)[:, ::-1], np.array(size) - 1).T)
    code, texture = regions[inside], density[inside]
    counts, genes, planted = _counts(rng, code, texture)
    ids = pd.Index([f"{a}x{b}" for a, b in zip(x, y, strict=True)])
    label = pd.Categorical.from_codes(code, categories=list(CLASSES))
    obs = pd.DataFrame(
        {
            "array_row": y,
            "array_col": x,
            "patient": pd.Categorical(["toy"] * len(ids)),
            "section": pd.Categorical([f"toy-{seed}"] * len(ids)),
            "pathologist": label,
            "annotation": label,
            "annotation_source": pd.Categorical(["pathologist"] * len(ids)),
            "texture": texture,
        },
        index=ids,
    )
    images = {IMAGE: image_element(build_levels(image))}
    sdata = section_of(csr_matrix(counts), obs, genes, centres, _DIAMETER_UM / mpp, mpp, images)
    sdata["table"].var["planted"] = planted
    return sdata


def _smooth(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    """Make a Gaussian random field of unit variance and a length scale in pixels, computed coarsely and enlarged."""
    from scipy.ndimage import gaussian_filter, zoom

    step = max(1.0, length / 4)
    coarse = tuple(int(np.ceil(n / step)) + 3 for n in size)
    field = gaussian_filter(rng.standard_normal(coarse), 2.0, mode="wrap")
    field = (field - field.mean()) / field.std()
    return zoom(field, step, order=1)[: size[0], : size[1]]


def _paint(rng: np.random.Generator, regions: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Draw stain densities by class and convert them to RGB by the Beer–Lambert law, ``(3, h, w)`` uint8."""
    from scipy.ndimage import gaussian_filter

    size = regions.shape

    def noise(sigma_um: float | tuple[float, float]) -> np.ndarray:
        sigma = np.array(sigma_um) / mpp
        field = gaussian_filter(rng.standard_normal(size).astype(np.float32), sigma, mode="wrap")
        return (field - field.mean()) / field.std()

    blobs, fibres, walls = noise(3.0), noise((2.0, 12.0)), noise(14.0)
    # Noise above the threshold is a nucleus: crowded in tumour, sparse elsewhere, and more at high density.
    threshold = np.array([1.15, 2.0, 2.6])[regions] - 0.9 * density * np.array([1.0, 0.5, 0.2])[regions]
    nuclei = blobs > threshold
    haematoxylin = np.where(nuclei, 0.9, 0.06) + 0.25 * (regions == 0)
    eosin = np.array([0.35, 0.5, 0.03])[regions] + np.where(regions == 1, 0.18 * fibres, 0.04 * fibres)
    eosin = np.where((regions == 2) & (np.abs(walls) < 0.12), 0.35, eosin)
    eosin, grain = np.clip(eosin, 0, None), rng.normal(0, 2.0, size)
    rgb = np.empty((3, *size), np.uint8)
    for channel in range(3):
        stain = haematoxylin * _HAEMATOXYLIN[channel] + eosin * _EOSIN[channel]
        rgb[channel] = np.clip(242 * np.exp(-stain) + grain, 1, 255)
    return rgb


def _counts(rng: np.random.Generator, code: np.ndarray, texture: np.ndarray) -> tuple[np.ndarray, pd.Index, list[str]]:
    """Draw Poisson counts of planted and housekeeping genes, with a sequencing depth that varies between spots."""
    planted = {name: kind for kind, names in PLANTED.items() for name in names} | dict.fromkeys(_HOUSEKEEPING, "none")
    rates = []
    for kind in planted.values():
        if kind == "none":
            rates.append(np.full(len(code), rng.uniform(5, 40)))
        else:
            level = texture * 12 * (code != 2) if kind == "texture" else 10.0 * (code == CLASSES.index(kind))
            rates.append(0.5 + level * rng.uniform(0.6, 1.4))
    depth = rng.lognormal(0, 0.3, len(code))
    counts = rng.poisson(np.array(rates).T * depth[:, None]).astype(np.float32)
    return counts, pd.Index(planted), list(planted.values())
