"""A model in LazySlide's interface: an encoder of its tiles, and a predictor of expression from their features."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._core import validate
from .._core.logs import warn
from ..image import FAULTS, faults, tissue_share
from ..models import HE2Gene, load
from ..models._ood import SlideFacts
from ._engine import predict
from ._lattice import SpotFeatures

#: Number of columns after the features: share of tissue, and the faults of the pixels.
_N_FACTS = 1 + len(FAULTS)


class _LazySlideBase:
    """Interface that LazySlide requires of any model."""

    name: str
    model: torch.nn.Module

    def get_transform(self) -> Callable[[np.ndarray], torch.Tensor]:
        """Return a function from a tile ``(s, s, 3)`` uint8 to ``(3, s, s)``; the model scales and normalises it itself."""
        return _channels_first

    def to(self, device: str | torch.device) -> Any:
        """Move the network to a device."""
        self.model.to(device)
        return self

    def try_compile(self, **_: Any) -> None:
        """Do nothing: the encoder is not compiled."""


def _channels_first(tile: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(tile, np.uint8).transpose(2, 0, 1)))


class TileEncoder(_LazySlideBase):
    """The encoder of a model on LazySlide's tiles: ``zs.tl.feature_extraction(wsi, model.encoder)``."""

    def __init__(self, model: HE2Gene, tile_mpp: float):
        self.name, self.model = f"{model.name}-features", model.network.extractor
        self._windows_um = model.card.windows_um
        self.tile_px = round(max(self._windows_um) / tile_mpp)
        self._tile_mpp = tile_mpp

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Encode tiles ``(b, 3, tile_px, tile_px)`` uint8 to features, tissue and faults ``(b, f + 4)`` float32."""
        if tuple(image.shape[1:]) != (3, self.tile_px, self.tile_px):
            raise ValueError(
                f"tiles of {tuple(image.shape[1:])} pixels do not fit the windows of {self._windows_um} µm; make them with "
                f"`zs.pp.tile_tissues(wsi, {self.tile_px}, mpp={self._tile_mpp:g})`"
            )
        sides = [round(um / self._tile_mpp) for um in self._windows_um]
        starts = [(self.tile_px - side) // 2 for side in sides]
        windows = tuple(
            image[:, :, start : start + side, start : start + side] for start, side in zip(starts, sides, strict=True)
        )
        with torch.autocast(image.device.type, enabled=False):
            features = self.model(windows).flatten(1)
        smallest = min(range(len(sides)), key=lambda i: sides[i])
        tissue = tissue_share(windows[smallest].cpu().numpy(), self._windows_um[smallest])
        facts = np.column_stack([tissue, faults(image.cpu().numpy(), self._tile_mpp)]).astype(np.float32)
        return torch.cat([features.float().cpu(), torch.from_numpy(facts)], dim=1)


class LazySlideModel(_LazySlideBase):
    """A model for LazySlide: ``zs.tl.feature_extraction`` with its ``encoder``, then ``zs.tl.feature_prediction``.

    A tile is as wide as the largest window, and the other windows are its centre. All tiles of a slide are predicted
    together, since a prediction also uses the slide and the neighbours of a spot.

    Parameters
    ----------
    model
        As in :func:`he2gene_sc.models.load`.
    mpp
        µm per pixel of level 0 of the slide: ``wsi.properties.mpp``.
    tile_mpp
        µm per pixel of the tiles.
    genes
        Genes to predict. Default: all genes of the model.

    Attributes
    ----------
    encoder
        Encoder for ``zs.tl.feature_extraction``.
    tile_px
        Side of the tiles in pixels, for ``zs.pp.tile_tissues``.
    genes
        Names of the predicted genes.

    Raises
    ------
    ValueError
        If the model does not know a gene, a gene is listed twice, or ``mpp`` is not a positive number.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> model = hg.LazySlideModel(mpp=0.5, genes=["ERBB2", "CD24"])
    >>> model.tile_px
    800
    >>> import lazyslide as zs  # doctest: +SKIP
    ...
    ... zs.pp.tile_tissues(wsi, model.tile_px, mpp=0.5, overlap=0.5)
    ... zs.tl.feature_extraction(wsi, model.encoder)
    ... zs.tl.feature_prediction(wsi, model, key_added="he2gene_tiles")
    """

    #: LazySlide passes the corners of the tiles, and all tiles at once.
    needs_coords = True
    whole_slide = True

    def __init__(
        self,
        model: str | Path | HE2Gene = "breast-her2st",
        *,
        mpp: float,
        tile_mpp: float = 0.5,
        genes: Collection[str] | None = None,
    ):
        for name, value in (("mpp", mpp), ("tile_mpp", tile_mpp)):
            validate.in_range(value, name, above=0, what="µm per pixel (`wsi.properties.mpp`), a number")
        loaded = load(model)
        self.genes = tuple(loaded.genes.index if genes is None else [genes] if isinstance(genes, str) else genes)
        if not self.genes:
            raise ValueError("`genes` is empty; pass names of genes, or None for all genes of the model")
        validate.all_different(self.genes, "genes")
        self._positions = loaded.genes.index.get_indexer(self.genes)
        if (self._positions < 0).any():
            unknown = [gene for gene, position in zip(self.genes, self._positions, strict=True) if position < 0]
            raise ValueError(
                f"`genes`: the model does not know {unknown[:5]}; its genes are the index of `hg.models.load().genes`"
            )
        self.name, self.model, self._network = loaded.name, loaded.network, loaded.network
        self.encoder = TileEncoder(loaded, float(tile_mpp))
        self.features_model_name = self.encoder.name
        self.tile_px = self.encoder.tile_px
        self._mpp, self._tile_mpp, self._tile_um = float(mpp), float(tile_mpp), max(loaded.card.windows_um)
        self._views = len(loaded.card.windows_um) if loaded.card.fusion == "mean" else 1

    def predict(self, features: np.ndarray, coords: np.ndarray) -> dict[str, np.ndarray]:
        """Predict the expression of all tiles of one slide.

        Parameters
        ----------
        features
            ``(n, f + 4)``, output of the encoder.
        coords
            ``(n, 2)`` x and y of the upper left corners of the tiles, in pixels of level 0.

        Returns
        -------
        dict
            For each gene ``(n,)`` float32, natural log of (1 + counts per 10,000). Warns if the slide is out of distribution.
        """
        features = np.asarray(features, np.float32)
        values, facts = features[:, :-_N_FACTS], features[:, -_N_FACTS:]
        spot_features = SpotFeatures(
            values.reshape(len(values), self._views, -1),
            SlideFacts(max(self._mpp, self._tile_mpp), facts[:, 0], facts[:, 1:]),
            np.asarray(coords, float) * self._mpp + self._tile_um / 2,
        )
        device = next(iter(self.model.buffers())).device
        with torch.autocast(device.type, enabled=False):
            found = predict(self._network, spot_features, device=device, dtype=torch.float32)
            expression = np.empty((len(values), len(self.genes)), np.float32)
            latent = torch.from_numpy(found.embedding)
            for rows, genes, block in self._network.expression_blocks(latent, self._positions):
                expression[rows, genes] = block
        if found.ood is not None and found.ood.verdict == "out of distribution":
            reasons = "; ".join(found.ood.reasons) or "it differs from the training slides"
            warn(f"the slide is out of distribution ({reasons}): do not trust the prediction")
        return dict(zip(self.genes, expression.T, strict=True))
