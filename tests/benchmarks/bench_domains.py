"""Size and power of the shift test of ``hg.tl.domain_preservation``, and its figures on real sections.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_domains.py size [A1 C5 hex toy strip]
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_domains.py discs [A1 C5 hex toy strip]
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_domains.py power
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_domains.py real

Size: 1,000 slides a line. What is simulated are label maps on the spots of a section, domains and clusters independent of
each other, each with 2 to 6 labels. On A1 and C5 clusters are also those of the verb's own pipeline on real expression
(A1 measured, C5 predicted by the bundled model, which has not seen C5; three seeds), and only the domains are simulated.
Beside the shift test stands the same index against 199 shuffles. Kinds of maps:

- ``field R``: a Gaussian random field of range R (share of the tissue; 0 is white noise) cut at random quantiles;
- ``argmax R``: the largest of several fields;
- ``compact``: Voronoi cells of one seed a label; ``patches``: of four seeds a label;
- ``layers``: bands along a random direction; ``strata``: along one direction in every slide; ``rings``: about a random
  point;
- ``rare``: one disc of 6 % of the spots against the rest;
- ``core``: rings about the middle of the tissue. Core against core is no null, both follow the outline of the tissue: it
  is printed to show what the test cannot see.

Discs: both maps are one disc of 30 % of the spots about a spot of the middle half of the tissue, the hardest compact
domains, since their places are not uniform.

Power: domains that follow the measured clusters in part: the largest, at each spot, of a field a cluster, with ``w`` added
to the field of the spot's own.
"""

import sys
import warnings

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import he2gene_sc as hg
from he2gene_sc.stats import MIN_OVERLAP, admissible_shifts, log_normalise, shift_test
from he2gene_sc.tl._domains.clusters import cluster, embed

N_SLIDES = 1000
PAIRS = [
    *((f"field {r}", f"field {r}") for r in ("0.0", "0.1", "0.25", "0.5")),
    ("field 0.0", "field 0.25"),
    ("argmax 0.25", "argmax 0.25"),
    ("compact", "compact"),
    ("compact", "field 0.25"),
    ("patches", "patches"),
    ("layers", "layers"),
    ("strata", "strata"),
    ("layers", "field 0.25"),
    ("rings", "rings"),
    ("rare", "rare"),
    ("rare", "field 0.25"),
    ("rare", "layers"),
    ("strata", "core"),
    ("core", "core"),
]
AGAINST_REAL = [
    "field 0.1",
    "field 0.25",
    "field 0.5",
    "compact",
    "patches",
    "layers",
    "strata",
    "rings",
    "rare",
    "core",
]


class Maps:
    """Random label maps on fixed spots."""

    def __init__(self, xy, seed=0):
        self.xy, self.rng = xy, np.random.default_rng(seed)
        self.low, self.high = xy.min(0), xy.max(0)
        self.extent = np.sqrt(np.prod(self.high - self.low))
        self.roots = {}

    def field(self, span):
        if span == 0:
            return self.rng.standard_normal(len(self.xy))
        if span not in self.roots:
            covariance = np.exp(-cdist(self.xy, self.xy) / (span * self.extent))
            self.roots[span] = np.linalg.cholesky(covariance + 1e-9 * np.eye(len(self.xy)))
        return self.roots[span] @ self.rng.standard_normal(len(self.xy))

    def bands(self, along, k):
        return np.searchsorted(np.sort(self.rng.uniform(along.min(), along.max(), k - 1)), along)

    def draw(self, kind, k):
        """One map with at least two labels of three spots, as the verb asks for."""
        while True:
            labels = np.unique(self._draw(kind, k), return_inverse=True)[1]
            if (np.bincount(labels) > 2).sum() > 1:
                return labels

    def _draw(self, kind, k):
        name, _, span = kind.partition(" ")
        rng, xy = self.rng, self.xy
        if name == "field":
            field = self.field(float(span))
            return np.searchsorted(np.quantile(field, np.cumsum(rng.dirichlet(np.full(k, 3)))[:-1]), field)
        if name == "argmax":
            return np.argmax([self.field(float(span)) for _ in range(k)], axis=0)
        if name in ("compact", "patches"):
            seeds = rng.uniform(self.low, self.high, (k if name == "compact" else 4 * k, 2))
            nearest = cKDTree(seeds).query(xy)[1]
            return nearest if name == "compact" else rng.integers(0, k, len(seeds))[nearest]
        if name in ("layers", "strata"):
            angle = rng.uniform(0, 2 * np.pi) if name == "layers" else 0.0
            along = xy @ [np.cos(angle), np.sin(angle)]
            across = xy @ [-np.sin(angle), np.cos(angle)] / self.extent
            wave = np.sin(2 * np.pi * (rng.uniform(0.5, 2) * across + rng.uniform()))
            return self.bands(along + 0.05 * self.extent * wave, k)
        if name == "disc":
            middle = np.argsort(np.linalg.norm(xy - xy.mean(0), axis=1), kind="stable")[: len(xy) // 2]
            distance = np.linalg.norm(xy - xy[rng.choice(middle)], axis=1)
            return (distance <= np.sort(distance)[int(0.3 * len(xy))]).astype(int)
        if name == "rare":
            distance = np.linalg.norm(xy - xy[rng.integers(len(xy))], axis=1)
            return (distance <= np.sort(distance)[max(3, int(0.06 * len(xy)))]).astype(int)
        middle = rng.uniform(self.low, self.high) if name == "rings" else xy.mean(0)
        return self.bands(np.linalg.norm(xy - middle, axis=1), k)


def lattice(rows, columns):
    return np.stack(np.meshgrid(np.arange(float(columns)), np.arange(float(rows))), -1).reshape(-1, 2)


def hexagonal():
    """Visium-like: a hexagonal lattice cut to an irregular outline, 520 spots."""
    row, column = np.mgrid[:30, :30]
    xy = np.c_[(column + 0.5 * (row % 2)).ravel(), (row * np.sqrt(0.75)).ravel()]
    x, y = (xy - xy.mean(0)).T
    angle = np.arctan2(y, x)
    return xy[np.hypot(x, y) < 12 * (1 + 0.2 * np.sin(3 * angle) + 0.1 * np.cos(5 * angle))]


def section(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hg.datasets.her2st(name)


def expression(name):
    """Measured log expression of A1, the 2,000 most variable genes; predicted of C5, the reliable genes."""
    sdata = section(name)
    table = sdata["table"]
    if name == "A1":
        values = log_normalise(table.X)
        return values[:, np.argsort(-values.var(0), kind="stable")[:2000]]
    hg.tl.predict(sdata, show_progress_bar=False)
    return np.asarray(table[:, hg.get.genes(sdata, reliable=True)].layers["he2gene"])


def size(names, pairs=PAIRS, kinds_against_real=AGAINST_REAL):
    grids = {"hex": hexagonal, "toy": lambda: lattice(12, 12), "strip": lambda: lattice(4, 30)}
    for name in names:
        xy = grids[name]() if name in grids else section(name)["table"].obsm["spatial"]
        shifts = admissible_shifts(xy, min_overlap=MIN_OVERLAP, n_max=999)
        maps = Maps(xy)
        shuffles = np.array([maps.rng.permutation(len(xy)) for _ in range(199)], np.int32)
        print(
            f"\n{name}: {len(xy)} spots, {len(shifts)} shifts; rejected at p < .05 by shifts, by shuffles", flush=True
        )
        real = {}
        if name in ("A1", "C5") and kinds_against_real:
            features = embed(expression(name))
            real = {k: cluster(features, k, [0, 1, 2], "leiden") for k in range(2, 7)}
        for domains, clusters in [*pairs, *((kind, "real") for kind in kinds_against_real if real)]:
            p_values = []
            for _ in range(N_SLIDES):
                k = int(maps.rng.integers(2, 7))
                a = maps.draw(domains, k)
                b = real[k] if clusters == "real" else [maps.draw(clusters, int(maps.rng.integers(2, 7)))]
                p_values.append([shift_test([a] * len(b), b, moves).p_value for moves in (shifts, shuffles)])
            by_shift, by_shuffle = (np.array(p_values) < 0.05).mean(0)
            print(f"  {domains:12} {clusters:12} {by_shift:6.1%} {by_shuffle:6.1%}", flush=True)


def power():
    for name in ("A1", "C5"):
        xy, clusters = section(name)["table"].obsm["spatial"], cluster(embed(expression(name)), 4, [0, 1, 2], "leiden")
        shifts = admissible_shifts(xy, min_overlap=MIN_OVERLAP, n_max=999)
        maps = Maps(xy)
        own = np.eye(clusters[0].max() + 1)[clusters[0]]
        for weight in (0.5, 1.0, 1.5, 2.0, 3.0):
            tests = []
            for _ in range(200):
                fields = np.stack([maps.field(0.1) for _ in own.T], axis=1)
                labels = np.unique(np.argmax(fields + weight * own, axis=1), return_inverse=True)[1]
                tests.append(shift_test([labels] * 3, clusters, shifts))
            index, called = np.mean([t.observed for t in tests]), np.mean([t.p_value < 0.05 for t in tests])
            print(f"{name}, w {weight}: mean adjusted Rand index {index:.2f}, called {called:.0%}", flush=True)


def real():
    for name, key, layer in (("C5", "label_warp", "he2gene"), ("A1", "pathologist", None)):
        sdata = section(name)
        if layer is not None:
            hg.tl.predict(sdata, show_progress_bar=False)
        for method in ("leiden", "kmeans"):
            hg.tl.domain_preservation(sdata, key, layer=layer, clustering=method)
            scores = hg.get.domains(sdata)
            print(f"\n{name}, {key}, {method}, {len(sdata['table'].uns['he2gene_domains']['genes'])} genes")
            wide = scores.pivot_table("mean", ["labels", "against"], "score", sort=False, dropna=False)
            print(wide.dropna(how="all").round(2).fillna("").to_string())
            tested = scores[scores["score"] == "ari"]
            print(tested[["labels", "against", "mean", "sd", "pval", "n_shifts", "null_mean"]].round(3).to_string())


if __name__ == "__main__":
    mode, *rest = sys.argv[1:] or ["size"]
    grids = rest or ["A1", "C5", "hex", "toy", "strip"]
    modes = {
        "size": lambda: size(grids),
        "discs": lambda: size(grids, [("disc", "disc")], []),
        "power": power,
        "real": real,
    }
    modes[mode]()
