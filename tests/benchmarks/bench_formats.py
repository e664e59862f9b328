"""Odd files: what should happen to each, what happened, and whether that is right.

python tests/benchmarks/bench_formats.py FOLDER

FOLDER holds ``svs, tiff, png, jpeg, pen`` and folders of Space Ranger, as described in its README. Nothing is copied.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import numpy as np

#: Files by what should happen. "read (w, h)": `hg.io.read_he` gives that size as RGB uint8, with that mpp where one is
#: named. "refuse": an error that names the file.
FILES = {
    "svs/cmu-1-small-region.svs": ("read", (2220, 2967), 0.499),
    "svs/tcga-cr-7395-01a-01-ts1.svs": ("read", (4443, 3567), None),
    "svs/broken.svs": ("refuse",),
    "svs/small.svs": ("read, nothing to predict on", (16, 16), 0.499),
    "svs/unreadable.svs": ("refuse",),
    "tiff/boxes.tiff": ("read", (300, 250), None),
    "tiff/unopenable.tiff": ("refuse",),
    "tiff/test_orient0.tif": ("refuse",),
    "tiff/test_orient3.tif": ("refuse",),
    "tiff/test_orient5.tif": ("refuse",),
    "tiff/test_orient8.tif": ("refuse",),
    "tiff/grey10kx5k.tif": ("refuse",),
    "tiff/small_la.tiff": ("refuse",),
    "tiff/yb10kx5k.zstd.tiff": ("read, not tissue", (10000, 5000), None),
    "tiff/rgba_geotiff.tiff": ("read, not tissue", (600, 600), None),
    "tiff/xy_12bit__plant.ome.tiff": ("refuse",),
    "png/boxes.png": ("read", (300, 250), None),
    "png/yb10kx5ktrans.png": ("read, not tissue", (10000, 5000), None),
    "png/test_RGB_16.png": ("read", (64, 64), None),
    "png/test_LA_16.png": ("refuse",),
    "jpeg/paper_figure1.jpg": ("read, not tissue", (1112, 528), None),
    "pen/high-nuclei-score-red-pen-level1.png": ("read, not tissue", (512, 512), None),
    "pen/medium-nuclei-score-green-pen-level1.png": ("read, not tissue", (512, 512), None),
    "pen/no-tissue-green-pen.png": ("read, not tissue", (512, 512), None),
    "pen/no-tissue-line.png": ("read, not tissue", (512, 512), None),
    "pen/wsi-blue-pen.png": ("read, nothing to predict on", (174, 133), None),
}
#: Folders by what should happen, and words of the error or warning that say so.
FOLDERS = {
    "spaceranger_1": ("a black hires is no tissue", ("blank",)),
    "spaceranger_2/outs": ("refused to predict", ("resolution", "blank", "coarse", "px")),
    "spaceranger_probe": ("probes are not genes", ("probes, not genes",)),
    "visium_hd_2um/binned_outputs": ("bins far below a spot", ("bins", "pool", "px", "neighbour")),
    "visium_hd_blank/binned_outputs": ("a transparent image has no tissue", ("blank",)),
}
#: Pixels that show what an image should look like: position (x, y) and colour.
WHITE = {"jpeg/paper_figure1.jpg": (2, 2)}
#: µm per pixel to try where a file states none.
MPP = {"pen/wsi-blue-pen.png": 60.0, "pen": 0.5, "jpeg": 2.0, "tiff": 2.0, "png": 2.0, "svs": 0.5}


class Said(logging.Handler):
    """What is said meanwhile."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.words = []

    def emit(self, record):
        self.words.append(record.getMessage())


def short(text: object, n: int = 110) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= n else text[: n - 1] + "…"


def read(path: Path, name: str, expected: tuple):
    import he2gene_sc as hg

    try:
        sdata = hg.io.read_he(path)
    except (OSError, ValueError) as error:
        named = path.name in str(error)
        return None, expected[0] == "refuse" and named, f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - any error is a row of the table
        return None, False, f"{type(error).__name__}: {error}"
    image = sdata["he"]
    image = image["scale0"]["image"] if hasattr(image, "children") else image
    size, mpp = (image.sizes["x"], image.sizes["y"]), sdata.attrs.get("he2gene", {}).get("mpp", {}).get("he")
    happened = f"read {size[0]} × {size[1]} {image.dtype}, {mpp or 'no'} µm/px"
    if expected[0] == "refuse":
        return None, False, happened
    right = size == expected[1] and image.dtype == np.uint8 and image.sizes["c"] == 3
    right &= (mpp is None) == (expected[2] is None) and (mpp is None or abs(mpp / expected[2] - 1) < 0.01)
    if name in WHITE:
        x, y = WHITE[name]
        colour = np.asarray(image[:, y, x])
        right &= bool((colour > 240).all())
        happened += f", paper {colour.tolist()}"
    return sdata, right, happened


def predict(sdata, name: str) -> tuple[bool, str]:
    """Whether something says that this is not tissue like that of training."""
    import he2gene_sc as hg

    mpp = sdata.attrs.get("he2gene", {}).get("mpp", {}).get("he") or MPP.get(name) or MPP[name.split("/")[0]]
    said = Said()
    logging.getLogger("he2gene_sc").addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                hg.pp.tissue(sdata)
                hg.pp.grid(sdata, mpp=mpp)
                hg.tl.predict(sdata, mpp=mpp, genes=["ERBB2", "CD24", "COL1A1"])
            except (OSError, ValueError) as error:
                return True, f"refused: {error}"
            except Exception as error:  # noqa: BLE001 - any error is a row of the table
                return False, f"{type(error).__name__}: {error}"
        words = said.words + [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    finally:
        logging.getLogger("he2gene_sc").removeHandler(said)
    found = [w for w in words if any(part in w.lower() for part in ("train", "tissue", "unlike", "distribution"))]
    return bool(found), f"predicted {len(sdata['spots'])} spots, said: {found[0] if found else words}"


def spots_of(spatial: Path):
    """Image, spots and µm/px of a folder of Space Ranger, as they are: the finest image, all spots of the array."""
    import json

    import pandas as pd
    from spatialdata.models import ShapesModel

    import he2gene_sc as hg

    image = next(p for p in (spatial / f"tissue_{size}_image.png" for size in ("hires", "lowres")) if p.exists())
    factors = json.loads((spatial / "scalefactors_json.json").read_text())
    scale = factors["tissue_hires_scalef" if "hires" in image.name else "tissue_lowres_scalef"]
    columns = ["barcode", "in_tissue", "row", "column", "y", "x"]
    file = next(spatial.glob("tissue_positions*"))
    if file.suffix == ".parquet":
        positions = pd.read_parquet(file).set_axis(columns, axis=1)
    else:
        positions = pd.read_csv(file, header=None if file.stem.endswith("list") else 0).set_axis(columns, axis=1)
    sdata = hg.io.read_he(image)
    centres = positions[["x", "y"]].to_numpy(dtype=float) * scale
    radius = factors["spot_diameter_fullres"] * scale / 2
    sdata["spots"] = ShapesModel.parse(centres, geometry=0, radius=radius, index=positions["barcode"].to_numpy())
    # A spot of Visium is 65 µm across by Space Ranger's own measure.
    return sdata, factors.get("microns_per_pixel", 65 / factors["spot_diameter_fullres"]) / scale


def probes_of(file: Path):
    """A slide whose table holds the matrix of probes."""
    import scanpy as sc

    import he2gene_sc as hg

    sdata, table = hg.datasets.toy(), sc.read_10x_h5(file)
    old = sdata["table"]
    table = table[np.argsort(-np.asarray(table.X.sum(1)).ravel())[: len(old)]].copy()
    table.obs, table.uns = old.obs.copy(), dict(old.uns)
    del sdata.tables["table"]
    sdata["table"] = table
    return sdata, 2.0


def try_folder(folder: Path, words: tuple[str, ...]) -> tuple[bool, str]:
    """Predict on a folder of Space Ranger: an error, or a warning, that says what is wrong in one of these words."""
    import he2gene_sc as hg

    spatial = sorted(folder.rglob("spatial"))
    sdata, mpp = spots_of(spatial[-1]) if spatial else probes_of(next(folder.glob("*.h5")))
    said = Said()
    logging.getLogger("he2gene_sc").addHandler(said)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            hg.tl.predict(sdata, mpp=mpp, genes=["ERBB2", "CD24", "COL1A1"])
            happened = [*said.words, *(str(w.message) for w in caught if issubclass(w.category, UserWarning))]
        except (OSError, ValueError, TypeError) as error:
            happened = [f"refused: {error}"]
        except Exception as error:  # noqa: BLE001 - any error is a row of the table
            return False, f"{type(error).__name__}: {error}"
    found = [text for text in happened if any(word in text for word in words)]
    return bool(found), str(found[0] if found else happened)


def main(folder: Path, only: str | None = None) -> int:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    rows = []
    if missing := [name for name in (*FILES, *FOLDERS) if not (folder / name).exists()]:
        sys.exit(f"{folder} lacks {', '.join(missing)}")
    for name, expected in FILES.items():
        if only and only not in name:
            continue
        sdata, right, happened = read(folder / name, name, expected)
        if sdata is not None and "," in expected[0]:
            said, more = predict(sdata, name)
            right, happened = right and said, f"{short(happened, 50)}; {more}"
        rows.append((name, expected[0] + (f" {expected[1]}" if len(expected) > 1 else ""), happened, right))
        print(
            " | ".join(["", name, rows[-1][1], short(happened), "right" if right else "WRONG", ""]).strip(), flush=True
        )
    for name, (expected, words) in FOLDERS.items():
        if only and only not in name:
            continue
        right, happened = try_folder(folder / name, words)
        rows.append((name, expected, happened, right))
        print(" | ".join(["", name, expected, short(happened), "right" if right else "WRONG", ""]).strip(), flush=True)
    wrong = sum(not row[3] for row in rows)
    print(f"{len(rows)} files and folders, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="part of the name of files to try")
    chosen = parser.parse_args()
    sys.exit(bool(main(chosen.folder, chosen.only)))
