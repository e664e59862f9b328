"""Small synthetic folder in the layout of HEST-1k, with its quirks; tissue, genes and slides are those of `hbcis_mini`."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import tifffile
from scipy.sparse import csr_matrix

from tests.helpers.hbcis_mini import AMBIGUOUS, GENES, _counts, _grid, _slide

HBCIS = "Integrating spatial gene expression and breast tumour morphology via deep learning"
HER2ST = "Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated cell type interactions"
STAHL = "Visualization and analysis of gene expression in tissue sections by spatial transcriptomics"
XENIUM = "FFPE Human Breast with Custom Add-on Panel"
CELLS = "FFPE Human Breast using the Entire Sample Area"
ST = "Spatial Transcriptomics"
#: Title, patient and technology by id.
SAMPLES = {
    "TENX99": (CELLS, "patient 1", "Xenium"),
    "TENX97": (XENIUM, "patient 1", "Xenium"),
    "TENX39": ("Ductal Carcinoma In Situ (FFPE)", None, "Visium"),
    "SPA130": (HER2ST, "Patient E", ST),
    "SPA118": (HBCIS, "BC23287", ST),
    "SPA102": (HBCIS, "BC23567", ST),
    "SPA1": (STAHL, None, ST),
    "SPA0": (STAHL, None, ST),
}
#: Rows of the table that are not in the folder.
ELSEWHERE = {"MEND1": ("Brain", "Mus musculus", "Visium"), "NCBI500": ("Kidney", "Homo sapiens", "Visium HD")}
CONTROLS = ["NegControlProbe_00042", "BLANK_0069", "UnassignedCodeword_0001"]
#: Spots per side, pixels per step, µm per step, and diameter in µm.
LATTICE = {ST: (200.0, 100.0), "Visium": (100.0, 55.0), "Xenium": (100.0, np.nan)}
SIDE, PITCH = 5, 60


def write_hest(root, samples=SAMPLES, *, side=SIDE, seed=0):
    """Write HEST to `root`: `side` × `side` spots per sample, images of `(side + 1) * 60` pixels."""
    root = Path(root)
    for folder in ("st", "wsis", "metadata", "patches"):
        (root / folder).mkdir(parents=True)
    rows = []
    for i, (name, (title, patient, technology)) in enumerate(samples.items()):
        pitch_um, diameter = LATTICE[technology]
        rng = np.random.default_rng([seed, i])
        n_genes, n_spots = _write_sample(root, name, technology, rng, side)
        row = {
            "dataset_title": title,
            "id": name,
            "image_filename": f"{name}.tif",
            "organ": "Breast",
            "disease_state": "Cancer",
            "oncotree_code": "IDC",
            "species": "Homo sapiens",
            "patient": patient,
            "st_technology": technology,
            "license": None,
            "inter_spot_dist": np.nan if technology == "Xenium" else pitch_um,
            "spot_diameter": diameter,
            "spots_under_tissue": n_spots,
            "nb_genes": n_genes,
            # The resolution in the file is often missing or wrong.
            "pixel_size_um_embedded": 1.0 if i % 2 else np.nan,
            "pixel_size_um_estimated": pitch_um / PITCH,
            "magnification": "20x",
            "fullres_px_width": (side + 1) * PITCH,
            "fullres_px_height": (side + 1) * PITCH,
        }
        (root / "metadata" / f"{name}.json").write_text(json.dumps(row), encoding="utf-8")
        rows.append(row)
    for name, (organ, species, technology) in ELSEWHERE.items():
        rows.append(rows[0] | {"id": name, "organ": organ, "species": species, "st_technology": technology})
    pd.DataFrame(rows).to_csv(root / "HEST_v1_1_0.csv", index=False, encoding="utf-8-sig")
    pd.DataFrame(rows[:1]).to_csv(root / "HEST_v1_0_2.csv", index=False)
    return root


def _write_sample(root, name, technology, rng, side):
    x, y = _grid(side)
    density, image, pixels = _slide(rng, x, y, side, PITCH)
    counts = _counts(rng, density)
    # Legacy ST of one study has Ensembl ids, the others have symbols.
    names = list(GENES.values()) if name in ("SPA118", "SPA102") else list(GENES)
    obs = pd.DataFrame({"array_row": y, "array_col": x}, index=[f"{a:03d}x{b:03d}" for a, b in zip(y, x, strict=True)])
    if technology == ST:
        counts, names = np.column_stack([counts, np.full(len(x), 3)]), [*names, AMBIGUOUS]
    elif technology == "Visium":
        # The last row of spots lies off the tissue.
        obs["in_tissue"] = (y < y.max()).astype(int)
        pixels = np.column_stack([pixels[:, 0] + PITCH / 2 * (y % 2), pixels[:, 1] * np.sqrt(0.75)])
    else:
        counts, names = np.column_stack([counts, np.full((len(x), len(CONTROLS)), 7)]), [*names, *CONTROLS]
        obs["in_tissue"] = True
    if name == "TENX99":
        # Three cells per square, which share its counts.
        at = rng.uniform(-0.45, 0.45, (3, *pixels.shape)) * PITCH
        pixels = np.concatenate(pixels + at)
        part = counts // 3
        counts = np.concatenate([part, part, counts - 2 * part])
        obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(counts))])
    table = anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))
    table.obsm["spatial"] = pixels
    table.uns["spatial"] = {"ST": {"images": {"downscaled_fullres": np.asarray(image)[::8, ::8]}}}
    table.write_h5ad(root / "st" / f"{name}.h5ad")
    levels = [np.asarray(image), np.asarray(image)[::2, ::2]]
    with tifffile.TiffWriter(root / "wsis" / f"{name}.tif") as tif:
        for i, level in enumerate(levels):
            tif.write(level, tile=(128, 128), photometric="rgb", subfiletype=int(i > 0), compression="zlib")
    return len(names), len(obs)
