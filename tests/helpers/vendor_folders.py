"""Small folders in the layout of Space Ranger and Xenium, which the readers of spatialdata-io expect, with a toy slide."""

import json
import zipfile

import h5py
import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from shapely.geometry import Polygon

import he2gene_sc as hg

MPP = 2.0
#: Pixels of the image per pixel of the downscaled images.
REDUCED = {"hires": 2, "lowres": 4}
PITCH_UM, SPOT_UM = 100.0, 55.0
#: µm per pixel of Xenium's own images, the target frame of the alignment of the H&E image.
XENIUM_MPP = 2.125


def toy_slide(n_spots):
    """Return RGB pixels ``(y, x, c)`` of a toy slide of 1 × 1.2 mm, counts ``(spots, genes)`` and gene names."""
    slide = hg.datasets.toy((4, 5), mpp=MPP)
    pixels = np.asarray(slide["he"]).transpose(1, 2, 0)
    counts = slide["table"].X.astype(np.int32).tocsr()[np.arange(n_spots) % slide["table"].n_obs]
    return pixels, counts, slide["table"].var_names


def reduce(pixels, step):
    """Return the mean colour of blocks of pixels."""
    height, width = (n // step * step for n in pixels.shape[:2])
    blocks = pixels[:height, :width].reshape(height // step, step, width // step, step, 3)
    return blocks.mean(axis=(1, 3)).astype(np.uint8)


def _write_counts(path, counts, genes, barcodes):
    """Write an HDF5 file of counts in the format of Cell Ranger 3 and later."""
    features = {"id": [f"ENSG{i:011d}" for i in range(len(genes))], "name": genes}
    features |= {"feature_type": ["Gene Expression"] * len(genes), "genome": ["GRCh38"] * len(genes)}
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([b"slide"])
        file.attrs["software_version"] = "spaceranger"
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        matrix["shape"] = np.array(counts.shape[::-1], dtype=np.int32)
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(counts, name)
        for name, values in features.items():
            matrix[f"features/{name}"] = np.array(values, dtype="S")


def _write_reduced_images(spatial, pixels):
    """Write ``hires`` and ``lowres``; returns their scale factors."""
    for name, step in REDUCED.items():
        Image.fromarray(reduce(pixels, step)).save(spatial / f"tissue_{name}_image.png")
    return {f"tissue_{name}_scalef": 1 / step for name, step in REDUCED.items()}


def st(folder):
    """Write counts of the ST pipeline, a spot file of the ST spot detector and the image for 20 spots of legacy ST."""
    pixels, counts, genes = toy_slide(20)
    y, x = np.divmod(np.arange(20), 5)
    position = pd.DataFrame({"x": x + 10, "y": y + 7})
    names = position["x"].astype(str) + "x" + position["y"].astype(str)
    pd.DataFrame(counts.toarray(), index=names, columns=genes).to_csv(folder / "counts.tsv.gz", sep="\t")
    pixel = {"pixel_x": (x + 1) * 200 / MPP, "pixel_y": (y + 1) * 200 / MPP}
    spots = position.assign(new_x=position["x"], new_y=position["y"], **pixel, selected=1)
    # A spot beside the tissue, which the pipeline counted nothing for.
    spots.loc[20] = [30, 30, 30, 30, 0, 0, 0]
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    Image.fromarray(pixels).save(folder / "slide.jpg", quality=95)


def visium(folder, version):
    """Write ``outs`` of Space Ranger 1, 2 or 3 for 20 spots of Visium, and ``slide.tif`` beside it."""
    pixels, counts, genes = toy_slide(20)
    row, place = np.divmod(np.arange(20), 4)
    column = 2 * place + row % 2
    x, y = (300 + column * PITCH_UM / 2) / MPP, (300 + row * PITCH_UM * 0.75**0.5) / MPP
    spatial = folder / "outs" / "spatial"
    spatial.mkdir(parents=True)
    barcodes = [f"ACGT{i:012d}-1" for i in range(20)]
    _write_counts(folder / "outs" / "filtered_feature_bc_matrix.h5", counts, genes, barcodes)
    positions = pd.DataFrame(
        {"in_tissue": 1, "array_row": row, "array_col": column, "pxl_row_in_fullres": y, "pxl_col_in_fullres": x},
        index=pd.Index(barcodes, name="barcode"),
    )
    positions = positions.round().astype(int) if version == 1 else positions
    positions.to_csv(
        spatial / ("tissue_positions_list.csv" if version == 1 else "tissue_positions.csv"), header=version > 1
    )
    factors = {"spot_diameter_fullres": SPOT_UM / MPP, "fiducial_diameter_fullres": 150 / MPP}
    factors |= _write_reduced_images(spatial, pixels)
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    if version == 3:  # CytAssist: its own image lies beside, and the counts of probes
        tifffile.imwrite(spatial / "cytassist_image.tiff", reduce(pixels, 4), photometric="rgb")
        _write_counts(folder / "outs" / "raw_probe_bc_matrix.h5", counts, genes, barcodes)
    tifffile.imwrite(folder / "slide.tif", pixels, photometric="rgb")


def visium_hd(folder):
    """Write ``outs`` of Space Ranger 3 for 20 × 20 bins of 8 µm and 10 × 10 of 16 µm, and ``slide.tif`` beside it."""
    outs = folder / "outs"
    (outs / "spatial").mkdir(parents=True)
    pixels, _, _ = toy_slide(12)
    factors = _write_reduced_images(outs / "spatial", pixels) | {"microns_per_pixel": MPP}
    for size in (8, 16):
        side = 160 // size
        _, counts, genes = toy_slide(side**2)
        row, column = np.divmod(np.arange(side**2), side)
        spatial = outs / "binned_outputs" / f"square_{size:03}um" / "spatial"
        spatial.mkdir(parents=True)
        barcodes = [f"s_{size:03}um_{r:05}_{c:05}-1" for r, c in zip(row, column, strict=True)]
        _write_counts(spatial.parent / "filtered_feature_bc_matrix.h5", counts, genes, barcodes)
        pd.DataFrame(
            {
                "barcode": barcodes,
                "in_tissue": 1,
                "array_row": row,
                "array_col": column,
                "pxl_row_in_fullres": (320 + (row + 0.5) * size) / MPP,
                "pxl_col_in_fullres": (320 + (column + 0.5) * size) / MPP,
            }
        ).to_parquet(spatial / "tissue_positions.parquet")
        of_bins = factors | {"bin_size_um": float(size), "spot_diameter_fullres": size / MPP}
        (spatial / "scalefactors_json.json").write_text(json.dumps(of_bins))
    with h5py.File(outs / "feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps({"hd_layout_json": json.dumps({"file_format": "1.0"})})
    tifffile.imwrite(folder / "slide.tif", pixels, photometric="rgb")


def xenium(folder):
    """Write ``outs`` of Xenium Onboard Analysis 2 for 25 cells, an H&E image and its alignment beside it."""
    import zarr

    outs = folder / "outs"
    (outs / "morphology_focus").mkdir(parents=True)
    pixels, counts, genes = toy_slide(25)
    row, column = np.divmod(np.arange(25), 5)
    x, y = 300.0 + 25 * column, 300.0 + 25 * row  # µm
    prefix = np.arange(1, 26, dtype=np.uint32)
    cells = [f"aaaaaa{chr(97 + i // 16)}{chr(97 + i % 16)}-1" for i in prefix]
    specs = {"analysis_sw_version": "xenium-2.0.0.10", "pixel_size": XENIUM_MPP, "region_name": "slide"}
    (outs / "experiment.xenium").write_text(json.dumps(specs))
    _write_counts(outs / "cell_feature_matrix.h5", counts, genes, cells)
    pd.DataFrame(
        {"cell_id": cells, "x_centroid": x, "y_centroid": y, "cell_area": 100.0, "nucleus_area": 30.0}
    ).to_parquet(outs / "cells.parquet")
    corners = np.array([(-8, -8), (8, -8), (8, 8), (-8, 8), (-8, -8)]) / 2
    for name, scale in (("cell", 2), ("nucleus", 1)):
        outlines = [Polygon(corners * scale + centre) for centre in zip(x, y, strict=True)]
        vertices = np.concatenate([np.asarray(outline.exterior.coords) for outline in outlines])
        pd.DataFrame(
            {
                "cell_id": np.repeat(cells, 5),
                "vertex_x": vertices[:, 0].astype(np.float32),
                "vertex_y": vertices[:, 1].astype(np.float32),
                "label_id": np.repeat(prefix.astype(np.int32), 5),
            }
        ).to_parquet(outs / f"{name}_boundaries.parquet")
    pd.DataFrame(
        {
            "transcript_id": np.arange(25, dtype=np.uint64),
            "cell_id": cells,
            "x_location": x.astype(np.float32),
            "y_location": y.astype(np.float32),
            "z_location": np.float32(10),
            "feature_name": list(genes[:25]),
            "qv": np.float32(40),
            "overlaps_nucleus": np.uint8(1),
        }
    ).to_parquet(outs / "transcripts.parquet")
    size = tuple(round(n * MPP / XENIUM_MPP) for n in pixels.shape[:2])
    masks = np.zeros(size, dtype=np.uint32)
    for label, (centre_x, centre_y) in enumerate(zip(x / XENIUM_MPP, y / XENIUM_MPP, strict=True), start=1):
        masks[int(centre_y) - 3 : int(centre_y) + 4, int(centre_x) - 3 : int(centre_x) + 4] = label
    with zarr.storage.ZipStore(outs / "cells.zarr.zip", mode="w", compression=zipfile.ZIP_STORED) as store:
        group = zarr.open_group(store, mode="w", zarr_format=2)
        group["cell_id"] = np.column_stack([prefix, np.ones_like(prefix)])
        group["cell_summary"] = np.zeros((25, 8))
        names = ("cell_centroid_x", "cell_centroid_y", "cell_area", "nucleus_centroid_x", "nucleus_centroid_y")
        group["cell_summary"].attrs["column_names"] = [*names, "nucleus_area", "z_level", "nucleus_count"]
        for index in range(2):
            group[f"masks/{index}"] = masks
            group[f"polygon_sets/{index}/cell_index"] = np.arange(25, dtype=np.uint32)
    tifffile.imwrite(outs / "morphology_focus" / "morphology_focus_0000.ome.tif", masks.astype(np.uint16))
    tifffile.imwrite(folder / "he_image.ome.tif", pixels, photometric="rgb")
    to_xenium = np.diag([MPP / XENIUM_MPP, MPP / XENIUM_MPP, 1])
    pd.DataFrame(to_xenium).to_csv(folder / "he_imagealignment.csv", header=False, index=False)
