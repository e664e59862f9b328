"""``hg.io.from_wsidata``: convert a slide of LazySlide with its tiles and the predictions of other models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import ATTRS, IMAGE
from .._core.mpp import attrs_with_mpp
from ._he import read_he

if TYPE_CHECKING:
    from spatialdata import SpatialData


def from_wsidata(
    wsi: Any, *, layers: Mapping[str, str] | None = None, tile_key: str = "tiles", image_key: str = IMAGE
) -> SpatialData:
    """Convert a slide that LazySlide has opened, with its tiles as spots.

    Parameters
    ----------
    wsi
        ``WSIData``, as ``wsidata.open_wsi`` returns it. Its file is read by region and has to stay where it is.
    layers
        Predicted expression to copy: name of a layer to key of a table of tiles in ``wsi.tables``, for example
        ``{"path2space": "path2space_tiles"}``. Genes that a table lacks are NaN in its layer.
    tile_key
        Shapes of the tiles.
    image_key
        Name of the image.

    Returns
    -------
    spatialdata.SpatialData
        Image ``image_key`` and shapes ``tile_key``; with ``layers`` also a table ``"table"`` of the tiles with the genes of
        all layers. Its ``X`` is NaN, since LazySlide has no measured expression.

    Raises
    ------
    ValueError
        If ``wsi`` is not a slide of LazySlide, a key is missing, or a table has other tiles or duplicated genes.


    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.io.from_wsidata(wsi, layers={"path2space": "path2space_tiles"})  # doctest: +SKIP
    >>> hg.tl.predict(sdata)  # doctest: +SKIP
    """
    if not all(hasattr(wsi, name) for name in ("reader", "properties", "images", "shapes", "tables")):
        raise ValueError(f"`wsi` is a {type(wsi).__name__}; a slide that `wsidata.open_wsi` opened is needed")
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel

    validate.key_in(
        tile_key, wsi.shapes, "tile_key", what="shapes", hint="; make tiles by `zs.pp.tile_tissues(wsi, …)`"
    )
    tiles, found = wsi.shapes[tile_key], {}
    for layer, key in (layers or {}).items():
        validate.key_in(key, wsi.tables, "layers", what="tables")
        own = wsi.tables[key]
        if own.n_obs != len(tiles):
            raise ValueError(f"`layers`: table {key!r} has {own.n_obs} rows, shapes {tile_key!r} {len(tiles)}")
        named = "tile_id" in tiles and "tile_id" in own.obs
        if named and list(own.obs["tile_id"].astype(str)) != list(tiles["tile_id"].astype(str)):
            raise ValueError(
                f"`layers`: 'tile_id' of table {key!r} differs from that of shapes {tile_key!r}, or its order"
            )
        validate.all_different(own.var_names, "layers", f"genes of table {key!r}")
        found[layer] = own.to_df()
    if wsi.reader.file in wsi.images:  # opened from a SpatialData object
        sdata = SpatialData(images={image_key: wsi.images[wsi.reader.file]})
        if wsi.properties.mpp is not None:
            sdata.attrs[ATTRS] = attrs_with_mpp(sdata, image_key, wsi.properties.mpp)
    else:
        sdata = read_he(wsi.reader.file, mpp=wsi.properties.mpp, image_key=image_key)
    sdata.shapes[tile_key] = ShapesModel.parse(GeoDataFrame(geometry=tiles.geometry.to_numpy()))
    if not layers:
        return sdata
    genes = list(dict.fromkeys(gene for values in found.values() for gene in values.columns))
    obs = pd.DataFrame({"region": pd.Categorical([tile_key] * len(tiles)), "tile": np.arange(len(tiles))})
    obs.index = obs.index.astype(str)
    table = AnnData(np.full((len(tiles), len(genes)), np.nan, np.float32), obs=obs, var=pd.DataFrame(index=genes))
    for layer, values in found.items():
        table.layers[layer] = values.reindex(columns=genes).to_numpy(np.float32)
    sdata.tables["table"] = TableModel.parse(table, region=tile_key, region_key="region", instance_key="tile")
    return sdata
