"""``hg.tl.embed``: compute the features of the encoder at every spot, to reuse them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from .._core import validate
from .._core.element_results import copy_tables
from .._core.keys import Keys, check_key
from .._core.ownership import check_free
from .._core.results import write_result
from .._settings import settings
from ._encoding import (
    Encoding,
    EncodingOptions,
    check_options,
    encode_slide,
    find_slides,
    is_interpolated,
    parts_of,
)

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from distributed import Client
    from spatialdata import SpatialData

    from ..inference import Part, SpotFeatures, Workers
    from ..models import HE2Gene


def embed(
    sdata: SpatialData,
    *,
    model: str | Path | HE2Gene = "breast-her2st",
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Mapping[str, float] | None = None,
    folder: str | Path | None = None,
    client: Client | None = None,
    key_added: str = "he2gene_features",
    exact: bool = False,
    device: str | torch.device | None = None,
    show_progress_bar: bool | None = None,
    copy: bool = False,
    **options: Unpack[EncodingOptions],
) -> SpatialData | None:
    """Compute the features of a model's encoder at every spot.

    Encoding is nearly all of the work of :func:`predict`. Pass the stored features to its argument ``features``, for other genes
    and other models with the same encoder and windows.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image and spots.
    model
        Name of a bundled model, a model folder, or a loaded model. Only its encoder, windows and µm/px are used, not its heads.
    image_key, shapes_key, table_key, coordinate_system, mpp
        As for :func:`predict`.
    folder
        Folder for the features; it is created if needed. Nothing is written to ``sdata`` then. An interrupted run can be resumed
        and gives the same numbers. A folder may hold features of many slides and encoders, also those of
        ``hg.tl.train(cache=...)``.
    client
        Client of a running dask cluster. Its workers encode the slide together and write to ``folder``, one worker per GPU. The
        features are bit for bit those of one worker of the same kind. Workers must see the same files; an image in memory must not
        exceed 64 MiB. ``device`` is that of the workers: ``"auto"`` uses the device of each, in the precision of this process
        (``dtype``). Default: this process encodes.
    key_added
        Name of the record in ``uns``; the features are in ``obsm["X_" + key_added]``.
    exact
        Encode each spot even if spots are closer than half the smallest window. Default: interpolate features, see
        :func:`predict`.
    device, show_progress_bar, copy
        As for :func:`predict`.
    **options
        ``tta``, ``batch_size``, ``dtype`` and ``lattice``, as for :func:`predict`.

    Returns
    -------
    ``None``, or the new object if ``copy=True``. Without ``folder``, results are written to the table:

    ``.obsm["X_he2gene_features"]``
        ``(n_obs, f)`` float32: concatenated features of the windows, then statistics of their colours; for models that average
        windows (``fusion="mean"``), concatenated features of each view. NaN for spots outside the image.
    ``.uns["he2gene_features"]``
        Encoder, its hash and licence, windows, µm/px, and all else that the features depend on. :func:`predict` compares it.

    Raises
    ------
    ValueError
        If an argument or the object is invalid; no table annotates the spots and no folder is given; the features exceed
        ``hg.settings.memory_limit`` and no folder is given; or a key exists that this function did not write. If ``client``
        is given without ``folder``, or its workers do not read the same files.
    RuntimeError
        If workers of ``client`` died. Finished blocks stay in the folder.
    OSError
        If the folder cannot be written, or the disk has too little space. Then nothing is encoded.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy(shape=(4, 4))
    >>> hg.tl.embed(sdata, show_progress_bar=False)
    >>> sdata["table"].obsm["X_he2gene_features"].shape[0]
    16
    >>> hg.tl.predict(sdata, features="X_he2gene_features", genes=["ERBB2"], show_progress_bar=False)
    """
    validate.arguments(embed, locals())
    from ..models import load

    check_key(key_added, "key_added")
    check_options("embed", options)
    target_folder = None if folder is None else validate.folder_or_file(folder, "folder")
    model = load(model)
    how = Encoding.checked(model, device, show_progress_bar, exact, options)
    slides = find_slides(
        sdata,
        model,
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
    )
    name = Keys(key_added).embedding
    parts = [parts_of(slide, model, how) for slide in slides]
    measured = slides[0].table_key
    workers = _workers(client, device, target_folder, parts)
    if target_folder is None:
        if measured is None:
            raise ValueError(
                "`table_key`: no table annotates the spots, so features cannot be written to one; write them to a folder: "
                "hg.tl.embed(sdata, folder='features')"
            )
        check_free(sdata[measured], "embed", key_added, obsm=[name])
        _check_size(sdata[measured], model, how)
    encoded = [
        encode_slide(slide, model, how, part, target_folder, workers) for slide, part in zip(slides, parts, strict=True)
    ]
    target = copy_tables(sdata) if copy else sdata
    if target_folder is None and measured is not None:
        matrices = [_flat(features, model) for features, _ in encoded]
        values = np.full((target[measured].n_obs, matrices[0].shape[1]), np.nan, np.float32)
        for slide, matrix in zip(slides, matrices, strict=True):
            values[slide.rows[slide.inside]] = matrix
        dense = [slide.shapes_key for slide, part in zip(slides, parts, strict=True) if is_interpolated(part)]
        record = how.facts(model, dense) | {
            "mpp": {slide.shapes_key: slide.mpp for slide in slides},
            "image": {slide.shapes_key: slide.image_key for slide in slides},
            "n_views": _n_views(model, how),
            "lattice": how.step or 0.0,
            "facts": {slide.shapes_key: facts for slide, (_, facts) in zip(slides, encoded, strict=True)},
        }
        params = {"model": model.name, "shapes_key": shapes_key, "exact": exact}
        write_result(target[measured], "embed", key_added, params=params, facts=record, obsm={name: values})
    return target if copy else None


def _workers(
    client: Client | None, device: str | torch.device | None, folder: Path | None, parts: list[tuple[Part, ...]]
) -> Workers | None:
    """Return the workers of the cluster; raise if they cannot encode the parts of the slides."""
    if client is None:
        return None
    from ..inference import Workers

    validate.running_client(client)
    if folder is None:
        raise ValueError(
            "`folder` is None, but workers of `client` write features to a folder that all of them see; pass it: "
            "hg.tl.embed(sdata, folder='features', client=client), then hg.tl.predict(sdata, features='features')"
        )
    workers = Workers(client, settings.device if device is None else device)
    for part in parts:
        for window in part:
            workers.check(window.reader)
    return workers


def _n_views(model: HE2Gene, how: Encoding) -> int:
    """Count the stored views: the mean over symmetries is one, but models that average windows need each view."""
    if model.network.extractor.fusion != "mean":
        return 1
    return len(model.card.windows_um) * (8 if how.tta else 1)


def _check_size(table: AnnData, model: HE2Gene, how: Encoding) -> None:
    import torch

    extractor = model.network.extractor
    sides = extractor.window_px
    sides = (sides,) * len(model.card.windows_um) if isinstance(sides, int) else sides
    with torch.inference_mode():
        width = extractor(
            tuple(torch.zeros(1, 3, px, px, dtype=torch.uint8, device=extractor.mean.device) for px in sides)
        ).shape[2]
    n_bytes = 4 * table.n_obs * width * _n_views(model, how)
    if n_bytes > settings.memory_limit:
        raise ValueError(
            f"`folder` is None: the features need {n_bytes / 1e9:.1f} GB in obsm, settings.memory_limit is "
            f"{settings.memory_limit / 1e9:.1f} GB; write them to a folder: hg.tl.embed(sdata, folder='features')"
        )


def _flat(features: SpotFeatures, model: HE2Gene) -> np.ndarray:
    """Return the features with one row per spot, ``(n, views · f)``."""
    values = features.values
    whole = values if isinstance(values, np.ndarray) else values.views(slice(None))
    if model.network.extractor.fusion != "mean" and whole.shape[1] > 1:
        whole = whole.mean(1, keepdims=True)
    return whole.reshape(len(whole), -1)
