"""Snapshots of objects, and an object of two slides."""

import anndata as ad
import numpy as np
import spatialdata as sd
from spatialdata.models import TableModel
from spatialdata.transformations import Identity, set_transformation

import he2gene_sc as hg


def snapshot(sdata):
    """Return the content of an object as plain comparable values."""
    seen = {"attrs": repr(sdata.attrs), "elements": sorted(name for _, name, _ in sdata.gen_elements())}
    for name, image in sdata.images.items():
        seen[name] = sd.get_pyramid_levels(image, n=0).to_numpy().tobytes() if hasattr(image, "children") else id(image)
    for name, shapes in sdata.shapes.items():
        seen[name] = (list(shapes.index), shapes.geometry.to_wkb().tolist())
    for name, table in sdata.tables.items():
        dense = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
        seen[name] = {
            "X": dense.tobytes(),
            "obs": table.obs.to_csv(),
            "var": table.var.to_csv(),
            "dtypes": (repr(table.obs.dtypes.to_dict()), repr(table.var.dtypes.to_dict())),
            "layers": {key: np.asarray(value).tobytes() for key, value in table.layers.items()},
            "obsm": {key: np.asarray(value).tobytes() for key, value in table.obsm.items()},
            "uns": repr({key: table.uns[key] for key in table.uns}),
        }
    return seen


def two_regions(toy, other=None):
    """Combine the toy slide and another one in an object with one table, with interleaved rows."""
    other = other or hg.datasets.toy((5, 6), mpp=2.0, seed=1)
    table = ad.concat({"spots": toy["table"], "more": other["table"]}, label="region", index_unique="-")
    table.obs["instance_id"] = [name.rsplit("-", 1)[0] for name in table.obs_names]
    table = table[np.random.default_rng(0).permutation(table.n_obs)].copy()
    del table.obsm["spatial"]
    both = sd.SpatialData(
        images={"he": toy["he"], "he2": other["he"]},
        shapes={"spots": toy["spots"], "more": other["spots"]},
        tables={
            "table": TableModel.parse(
                table,
                region=["spots", "more"],
                region_key="region",
                instance_key="instance_id",
                overwrite_metadata=True,
            )
        },
    )
    for element in ("he2", "more"):
        set_transformation(both[element], {"second": Identity()}, set_all=True)
    both.attrs["he2gene"] = {"mpp": {"he": 2.0, "he2": 2.0}}
    return both, other
