"""Small synthetic folders in the layout of HBCIS (Mendeley 29ntw7sh4r) and of her2st, with all their quirks.

The density of nuclei varies smoothly over each section: at high density, the image is dark and violet, at low density
pale and pink. Genes of `UP` increase with it, genes of `DOWN` decrease, and spots above the middle are tumour.
"""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

UP = {
    "ERBB2": "ENSG00000141736",
    "GNAS": "ENSG00000087460",
    "FASN": "ENSG00000169710",
    "KRT19": "ENSG00000171345",
    "KRT8": "ENSG00000170421",
    "KRT18": "ENSG00000111057",
    "EPCAM": "ENSG00000119888",
    "MUC1": "ENSG00000185499",
    "XBP1": "ENSG00000100219",
    "TFF3": "ENSG00000160180",
    "CDH1": "ENSG00000039068",
    "GRB7": "ENSG00000141738",
    "KRT7": "ENSG00000135480",
    "ATP1A1": "ENSG00000163399",
    "COX6C": "ENSG00000164919",
    "HSP90AB1": "ENSG00000096384",
    "PABPC1": "ENSG00000070756",
    "STARD3": "ENSG00000131748",
    "MIEN1": "ENSG00000141741",
    "SPDEF": "ENSG00000124664",
    "GATA3": "ENSG00000107485",
    "ESR1": "ENSG00000091831",
    "AGR2": "ENSG00000106541",
    "CLDN4": "ENSG00000189143",
}
DOWN = {
    "COL1A1": "ENSG00000108821",
    "COL1A2": "ENSG00000164692",
    "COL3A1": "ENSG00000168542",
    "VIM": "ENSG00000026025",
    "SPARC": "ENSG00000113140",
    "FN1": "ENSG00000115414",
    "DCN": "ENSG00000011465",
    "LUM": "ENSG00000139329",
    "COL6A1": "ENSG00000142156",
    "COL6A2": "ENSG00000142173",
    "COL6A3": "ENSG00000163359",
    "BGN": "ENSG00000182492",
    "MGP": "ENSG00000111341",
    "A2M": "ENSG00000175899",
    "TIMP1": "ENSG00000102265",
    "TIMP3": "ENSG00000100234",
    "IGFBP7": "ENSG00000163453",
    "AEBP1": "ENSG00000106624",
    "POSTN": "ENSG00000133110",
    "THBS2": "ENSG00000186340",
}
FLAT = {
    "ACTB": "ENSG00000075624",
    "GAPDH": "ENSG00000111640",
    "B2M": "ENSG00000166710",
    "EEF1A1": "ENSG00000156508",
    "RPL13": "ENSG00000167526",
    "RPS18": "ENSG00000231500",
    "TPT1": "ENSG00000133112",
    "FTL": "ENSG00000087086",
    "UBC": "ENSG00000150991",
    "PPIA": "ENSG00000196262",
}
#: Genes that are detected only in some sections; files of other sections omit them.
RARE = {
    "CLDN3": "ENSG00000165215",
    "S100A9": "ENSG00000163220",
    "PERP": "ENSG00000112378",
    "JUP": "ENSG00000173801",
    "ELF3": "ENSG00000163435",
    "CD24": "ENSG00000272398",
}
GENES = UP | DOWN | FLAT | RARE
AMBIGUOUS = "__ambiguous[ENSG00000141736+ENSG00000141738]"
#: Four patients; BC23287 is a test patient of the paper.
SECTIONS = {"BC23901": ("C2", "D1"), "BC23209": ("C1",), "BC23270": ("D2", "E1"), "BC23287": ("C1",)}
#: One section of each patient of HBCIS.
ALL_PATIENTS = {
    f"BC{n}": ("D1",)
    for n in (
        *(23209, 23268, 23269, 23270, 23272, 23277, 23287, 23288, 23377, 23450, 23506, 23508, 23567, 23803, 23810),
        *(23895, 23901, 23903, 23944, 24044, 24105, 24220, 24223),
    )
}
#: First array position of the tissue.
FIRST = (7, 10)


def write_hbcis(root, sections=SECTIONS, *, side=6, sides=None, seed=0):
    """Write HBCIS to `root`: `side` × `side` spots per section, images of about `(side + 1) * 60` pixels.

    `sides` maps patients to other values of `side`.
    """
    root = Path(root)
    root.mkdir(parents=True)
    rows = []
    for i, (patient, replicates) in enumerate(sections.items()):
        for j, replicate in enumerate(replicates):
            rng = np.random.default_rng([seed, i, j])
            # Names of images and spot files start with BT or BC, independent of the patient's name.
            name = patient if i % 3 == 1 else patient.replace("BC", "BT")
            row = {
                "type": ("Luminal_A", "HER2_luminal", "TNBC")[i % 3],
                "patient": patient,
                "replicate": replicate,
                "histology_image": f"HE_{name}_{replicate}.jpg",
                "count_matrix": f"{patient}_{replicate}_stdata.tsv.gz",
                "spot_coordinates": f"spots_{name}_{replicate}.csv.gz",
                "tumor_annotation": f"{patient}_{replicate}_Coords.tsv.gz",
            }
            _write_section(root, row, rng, (sides or {}).get(patient, side), pitch=50 + 7 * (i % 4))
            rows.append(row)
    pd.DataFrame(rows).to_csv(root / "metadata.csv", index=False)
    return root


def write_her2st(data_dir, sections, *, side=5, seed=1):
    """Write sections of her2st in the layout of `HE2GENE_DATA_DIR`."""
    root = Path(data_dir) / "her2st"
    for folder in ("ST-cnts", "ST-spotfiles", "ST-pat/lbl"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, section in enumerate(sections):
        rng = np.random.default_rng([seed, i])
        x, y = _grid(side)
        density, image, pixels = _slide(rng, x, y, side, pitch=60)
        counts = pd.DataFrame(_counts(rng, density), index=_names(x, y), columns=list(GENES))
        counts.loc[:, counts.sum() > 0].to_csv(root / f"ST-cnts/{section}.tsv.gz", sep="\t")
        spots = pd.DataFrame({"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": pixels[:, 0], "pixel_y": pixels[:, 1]})
        spots.assign(selected=1).to_csv(root / f"ST-spotfiles/{section}_selection.tsv", sep="\t", index=False)
        labels = np.where(density > 0.5, "invasive cancer", "connective tissue")
        pd.DataFrame({"x": x, "y": y, "label": labels}).to_csv(
            root / f"ST-pat/lbl/{section}_labeled_coordinates.tsv", sep="\t", index=False
        )
        (root / f"ST-imgs/{section[0]}/{section}").mkdir(parents=True)
        image.save(root / f"ST-imgs/{section[0]}/{section}/HE_{section}.jpg", quality=95)
    return Path(data_dir)


def _write_section(root, row, rng, side, pitch):
    x, y = _grid(side)
    density, image, pixels = _slide(rng, x, y, side, pitch)
    image.save(root / row["histology_image"], quality=95)
    # The spot file has one spot more than the other two files.
    ids = [*_names(x, y), f"{FIRST[0] + side}x{FIRST[1]}"]
    pixels = np.vstack([pixels, [(side + 0.9) * pitch, pitch]])
    pd.DataFrame(pixels.round(2), index=ids, columns=["X", "Y"]).to_csv(root / row["spot_coordinates"])
    # The counts list the whole array, in another order.
    around = np.concatenate([_counts(rng, density), rng.poisson(0.3, (side, len(GENES)))])
    counts = pd.DataFrame(
        around, index=[*_names(x, y), *(f"{k}x2" for k in range(1, side + 1))], columns=GENES.values()
    )
    counts = counts.loc[:, counts.loc[_names(x, y)].sum() > 0].assign(**{AMBIGUOUS: 3})
    counts.iloc[rng.permutation(len(counts))].to_csv(root / row["count_matrix"], sep="\t")
    # Old line ends, a header that lacks a name, adjusted positions; the last spot has no label.
    lines = ["xcoord\tycoord\tlab\ttumor\t"] + [
        f"{row['replicate']}_{a}_{b}\t{a + 0.02}\t{b - 0.01}\tL1\t{'tumor' if d > 0.5 else 'non'}"
        for a, b, d in zip(x[:-1], y[:-1], density, strict=False)
    ]
    with gzip.open(root / row["tumor_annotation"], "wb") as stream:
        stream.write(("\r".join(lines) + "\r").encode())


def _grid(side):
    y, x = (grid.ravel() for grid in np.mgrid[FIRST[1] : FIRST[1] + side, FIRST[0] : FIRST[0] + side])
    return x, y


def _names(x, y):
    return [f"{a}x{b}" for a, b in zip(x, y, strict=True)]


def _slide(rng, x, y, side, pitch):
    """Return the density of nuclei at the spots, the image, and the pixels of the spots."""
    size = (side + 1) * pitch
    centres = np.column_stack([x - FIRST[0] + 1, y - FIRST[1] + 1]) * float(pitch)
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    rows, columns = np.mgrid[:size, :size] / size
    wave = 0.5 + 0.5 * np.sin(4 * (np.cos(angle) * columns + np.sin(angle) * rows) + phase)
    rank = np.argsort(np.argsort(wave.ravel())).reshape(wave.shape) / wave.size
    nuclei = rng.random((size // 4 + 1,) * 2).repeat(4, 0).repeat(4, 1)[:size, :size] < 0.1 + 0.6 * rank
    pink, violet = np.array([235.0, 190, 215]), np.array([110.0, 70, 150])
    tint = rng.normal(0, 6, 3)
    pixels = np.where(nuclei[..., None], violet, pink) + tint + rng.normal(0, 4, (size, size, 3))
    at = centres.astype(int)
    return rank[at[:, 1], at[:, 0]], Image.fromarray(np.clip(pixels, 1, 255).astype(np.uint8)), centres


def _counts(rng, density):
    rates = [12 * density] * len(UP) + [12 * (1 - density)] * len(DOWN) + [np.full(len(density), 20.0)] * len(FLAT)
    rates += [np.full(len(density), 1.0 * rng.integers(2)) for _ in RARE]
    return rng.poisson(0.3 * (np.array(rates).T > 0) + np.array(rates).T * rng.lognormal(0, 0.2, (len(density), 1)))
