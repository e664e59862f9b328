"""From features to the embedding: a spot is seen against its slide and its neighbours. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse

#: Colour statistics of a window: mean, SD and covariances of the optical density of three channels.
N_COLOUR = 9

#: Arrays of a :class:`Basis` among the tensors of a model.
TENSORS = ("latent.mean", "latent.scale", "latent.projection", "latent.mixing")
#: Colour statistics of a window: mean, SD and covariances of the optical density of three channels.
N_COLOUR = 9


@dataclass(frozen=True)
class Context:
    """How a spot is seen against its slide and its neighbours.

    Attributes
    ----------
    rings_um
        Inner (included) and outer (excluded) radius of each ring, µm: the neighbours in it are averaged. Empty: a spot
        is seen alone. The default edges lie between the distances of spots on the grids of 200 and 100 µm pitch, so that
        rounding or a µm/px off by half a per cent moves no neighbour into the next ring.
    weights
        Weight of each ring beside the spot's own 1.
    prior_spots
        Number of spots that the training mean and variance count for when features are standardised within a slide;
        ``None``: they alone are used.
    """

    rings_um: tuple[tuple[float, float], ...] = ((50.0, 353.0), (353.0, 616.0), (616.0, 930.0))
    weights: tuple[float, ...] = (0.7, 0.5, 0.3)
    prior_spots: float | None = 20.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rings_um", tuple(tuple(float(um) for um in ring) for ring in self.rings_um))
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != len(self.rings_um) or any(not 0 <= a < b for a, b in self.rings_um):
            raise ValueError(
                f"`rings_um` {self.rings_um} must be pairs of inner and outer radius, with a weight each: {self.weights}"
            )

    def standardise(self, features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Centre and scale the features of all spots of one slide.

        Stain, scanner and resolution move the features of a whole slide. Its own mean and variance take that off; the
        training ones hold them back where a slide has few spots.

        Parameters
        ----------
        features
            ``(n, f)`` float32.
        mean, scale
            Of training, ``(f,)``; a scale of 0 sets a feature to 0.

        Returns
        -------
        numpy.ndarray
            ``(n, f)`` float32.
        """
        centre, spread = mean, scale
        if self.prior_spots is not None and len(features):
            n, prior = len(features), self.prior_spots
            own, variance = features.mean(0, dtype=np.float64), features.var(0, dtype=np.float64)
            centre = ((n * own + prior * mean) / (n + prior)).astype(np.float32)
            spread = np.sqrt((n * variance + prior * np.square(scale, dtype=np.float64)) / (n + prior))
        usable = scale > 0
        return (features - centre) * np.where(usable, 1 / np.where(usable, spread, 1), 0).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the card."""
        return asdict(self)


#: Pairs of neighbours that fit into a few GB.
_MAX_PAIRS = 2e8

#: A spot alone, standardised by training alone.
ALONE = Context((), (), None)


@dataclass(frozen=True)
class Basis:
    """From the features of the spots of a slide to their embedding.

    Attributes
    ----------
    mean, scale
        Mean of the training sections' means and root of the mean variance within them, ``(f,)``.
    projection
        Standardised features to components, ``(f, c)``.
    mixing
        Components of a spot and of its rings, side by side, to the embedding, ``(c · (1 + rings), k)``.
    context
        The rings.
    """

    mean: np.ndarray
    scale: np.ndarray
    projection: np.ndarray
    mixing: np.ndarray
    context: Context

    def components(self, features: np.ndarray, rings: Sequence[scipy.sparse.csr_array]) -> np.ndarray:
        """Own components of all spots of a slide and those of their rings: ``(n, f)`` to ``(n, c · (1 + rings))``."""
        own = self.context.standardise(features, self.mean, self.scale) @ self.projection
        return np.concatenate([own, *(ring @ own for ring in rings)], axis=1)

    def embed(self, features: np.ndarray, rings: Sequence[scipy.sparse.csr_array]) -> np.ndarray:
        """Embedding of all spots of a slide, ``(n, f)`` to ``(n, k)`` float32.

        Parameters
        ----------
        features
            Of every spot of the slide, averaged over symmetries.
        rings
            As :func:`rings_of` makes them of the spot centres.
        """
        return self.components(features, rings) @ self.mixing


def check_pairs(centres_um: np.ndarray, rings_um: tuple[tuple[float, float], ...]) -> None:
    """Refuse spots that have too many neighbours to average, before they are encoded.

    Raises
    ------
    ValueError
        If the pairs of neighbours would not fit into memory.
    """
    from scipy.spatial import cKDTree

    n = len(centres_um)
    if not rings_um or n == 0:
        return
    reach = max(outer for _, outer in rings_um)
    some = centres_um[:: max(1, n // 500)]
    tree = cKDTree(centres_um)
    expected = n * float(np.mean(tree.query_ball_point(some, reach, return_length=True))) / 2
    if expected > _MAX_PAIRS:
        raise ValueError(
            f"`shapes_key`: {n:,} spots lie too close: they have {expected:.2g} pairs of neighbours within {reach:g} µm, at "
            f"most {_MAX_PAIRS:.0g} fit into memory. Put bins or cells together to spots of 50 µm or more: "
            "hg.pp.tissue(sdata), hg.pp.grid(sdata, diameter_um=50, pitch_um=50, key_added='grid'), then "
            "hg.tl.predict(sdata, shapes_key='grid')"
        )


def rings_of(centres_um: np.ndarray, rings_um: tuple[tuple[float, float], ...]) -> tuple[scipy.sparse.csr_array, ...]:
    """Averaging matrices of the rings.

    Parameters
    ----------
    centres_um
        ``(n, 2)`` spot centres, µm.
    rings_um
        Inner (included) and outer (excluded) radius of each ring.

    Returns
    -------
    tuple of scipy.sparse.csr_array
        One ``(n, n)`` float32 a ring: row ``i`` averages the spots in the ring around spot ``i``. A ring without spots
        hands the spot itself on, so that a lone spot is taken to lie in tissue like its own.
    """
    from scipy.spatial import cKDTree

    n = len(centres_um)
    if not rings_um or n == 0:
        return tuple(scipy.sparse.csr_array((n, n), dtype=np.float32) for _ in rings_um)
    check_pairs(centres_um, rings_um)
    tree, reach = cKDTree(centres_um), max(outer for _, outer in rings_um)
    pairs = tree.query_pairs(reach, output_type="ndarray")
    distance = np.linalg.norm(centres_um[pairs[:, 0]] - centres_um[pairs[:, 1]], axis=1)
    matrices = []
    for inner, outer in rings_um:
        chosen = pairs[(distance >= inner) & (distance < outer)]
        rows, columns = np.concatenate([chosen, chosen[:, ::-1]]).T
        links = scipy.sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(n, n)).tocsr()
        count = np.diff(links.indptr)
        lone = scipy.sparse.diags_array((count == 0).astype(np.float32))
        mean = scipy.sparse.diags_array(1 / np.maximum(count, 1).astype(np.float32))
        matrices.append(scipy.sparse.csr_array(mean @ links + lone, dtype=np.float32))
    return tuple(matrices)
