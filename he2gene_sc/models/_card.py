"""Model card: what a model is, what it was trained on, and its held-out metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader

from .._core import validate
from ._encoders.scale import describe_tiles
from ._schema import EXPRESSION_SCALE, check_card, check_class_names

#: Increased when an older version of this package would misread a new card.
SCHEMA_VERSION = 4
#: First version that can be read, and fields that later ones added; they do not affect predictions.
_OLDEST = 2
_ADDED = {3: ("intervals", "guard"), 4: ("annotation", "programmes")}

#: Row of the card, and its name until version 0.6.
BLOCK_BOOTSTRAP = "bootstrap over 800 µm blocks of the section"
_OLD_BLOCK_BOOTSTRAP = re.compile("^95 % interval(?=, )")
#: Row of the card with paired differences to references without genes.
PAIRED = "mean Pearson, prediction minus"


@dataclass(frozen=True)
class ModelCard:
    """Facts about a model; ``card.json`` of its folder.

    Attributes
    ----------
    name, version
        Name and version of the model.
    description
        One paragraph of text.
    encoder
        ``name``, ``license``, ``sha256`` of the weights, ``input_px``. If they differ from the registry, ``mean`` and ``std``
        of the channels. ``stages`` whose maps are averaged, unless the output of the encoder is used; ``mpp`` of its training,
        if known; ``interpolation``, if not bilinear; ``tiles``, the number per side of each window, if a window is tiled;
        ``output`` for a patch of noise, if the encoder is a user's own network.
    windows_um
        Sides of the windows around a spot, µm.
    classes, class_colors
        Classes of the annotation and their colours; empty without an annotation head.
    n_genes, n_latent
        Numbers of genes and of components of the embedding.
    training
        Sections, patients, spots, µm/px, penalty and folds. Each section has ``image``: size and SHA-256 of some blocks of its
        pixels, and the bounding box of its spots, by which :func:`he2gene_sc.tl.predict` recognises it.
    metrics
        Held-out metrics by protocol.
    reliable_rule
        Conditions for a gene to be called reliable, or whole sentences.
    intended_use, limitations
        Sentences.
    license
        Licence of the model.
    files
        SHA-256 of every other file of the folder.
    expression_scale
        Unit of the predictions.
    fusion
        ``"concat"``: the features of all windows and their colours are concatenated. ``"mean"``: every window and every
        symmetry is a view, and predictions are averaged over views.
    context
        Rings of neighbours, the µm/px below which a prediction without them counts too, and the standardisation of a slide,
        see :class:`he2gene_sc.models._embedding.Context`; ``None`` if a spot is predicted from its own patch only.
    tta
        Whether inference averages over the eight symmetries of the square by default.
    intervals
        Basis of the quantiles of the residuals: ``unit`` (``"patient"`` or ``"section"``), ``n_groups``, their ``levels``,
        ``max_coverage``, ``spots`` by predicted class; ``None`` without intervals.
    guard
        Limits of :class:`he2gene_sc.models._ood.OODDetector`; ``None`` without a detector.
    annotation
        ``context``: neighbours that the annotation uses, if it has its own components; ``None`` if it uses the embedding.
    programmes
        ``n_patients`` that were held out in turn, and ``sets``: for each gene set its ``genes`` with weights, and the metrics of
        :func:`he2gene_sc.tl.programmes`; ``None`` without gene sets.
    schema_version
        Version of this layout.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> card = hg.models.load().card
    >>> card.classes[-1]
    'invasive cancer'
    >>> text = card.to_markdown()
    >>> hg.models.ModelCard.from_json(card.to_json(), "card.json") == card
    True
    """

    name: str
    version: str
    description: str
    encoder: dict[str, Any]
    windows_um: tuple[float, ...]
    classes: tuple[str, ...]
    class_colors: tuple[str, ...]
    n_genes: int
    n_latent: int
    training: dict[str, Any]
    metrics: dict[str, Any]
    reliable_rule: str
    intended_use: str
    limitations: tuple[str, ...]
    license: str = "BSD-3-Clause"
    files: dict[str, str] = field(default_factory=dict)
    expression_scale: str = EXPRESSION_SCALE
    fusion: str = "concat"
    context: dict[str, Any] | None = None
    tta: bool = False
    intervals: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    annotation: dict[str, Any] | None = None
    programmes: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("windows_um", "classes", "class_colors", "limitations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        validate.one_of(self.fusion, ("concat", "mean"), "fusion")
        check_class_names(self.classes)

    def to_json(self) -> str:
        """Return the card as JSON text, with keys in the order of the attributes."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelCard:
        """Read a card.

        Raises
        ------
        ValueError
            If the text is not JSON, the schema is newer than this package, or a field is missing, unknown or of another
            type. The message names the file and the field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`model`: {where} is not valid JSON ({error}); the folder is damaged") from error
        if not isinstance(data, dict) or type(data.get("schema_version")) is not int:
            raise ValueError(f"`model`: {where} has no `schema_version`; it is not a he2gene_sc model card")
        version = data["schema_version"]
        if not _OLDEST <= version <= SCHEMA_VERSION:
            problem = (
                f"this he2gene_sc reads up to {SCHEMA_VERSION}; upgrade with `pip install -U he2gene_sc`"
                if version > SCHEMA_VERSION
                else "of he2gene_sc 0.1, whose features this version does not compute; train the model again"
            )
            raise ValueError(f"`model`: {where} has schema version {version}, {problem}")
        for added, names in _ADDED.items():
            if version < added:
                data |= dict.fromkeys(names)
        data["schema_version"] = SCHEMA_VERSION
        metrics: Any = data.get("metrics")
        for protocol, rows in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(rows, dict):
                metrics[protocol] = {
                    _OLD_BLOCK_BOOTSTRAP.sub(BLOCK_BOOTSTRAP, row): found for row, found in rows.items()
                }
        check_card(data, where)
        return cls(**data)

    def facts(self) -> dict[str, str]:
        """Return the facts of the model that a notebook shows."""
        numbers = {
            "spots": self.training.get("n_spots"),
            "sections": len(self.training.get("sections", ())),
            "patients": self.training.get("n_patients"),
        }
        trained = [f"{n:,} {what}" for what, n in numbers.items() if n]
        return {
            "predicts": f"{self.n_genes:,} genes; {', '.join(self.classes) or 'no annotation'}",
            "trained on": ", ".join(trained) or "not stated",
            "encoder": f"{self.encoder['name']} ({self.encoder['license']})",
            "use": self.intended_use,
        }

    def _repr_html_(self) -> str:
        return as_html(f"{self.name} {self.version}", {**self.facts(), "whole card": "print(card.to_markdown())"})

    def to_markdown(self) -> str:
        """Return the card as markdown, the ``README.md`` of the folder."""
        environment = Environment(
            loader=PackageLoader("he2gene_sc", "models"),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        tiles, rings = self.encoder.get("tiles"), (self.context or {}).get("rings_um", ())
        training, sections = self.training, self.training.get("sections")
        if isinstance(sections, dict):
            # The image is for software, which recognises the section by it.
            shown = {name: {key: facts[key] for key in facts if key != "image"} for name, facts in sections.items()}
            training = {**training, "sections": shown}
        lines = [line for protocol, figures in self.metrics.items() for line in _figures(protocol, figures)]
        rows = [row for figures in self.metrics.values() if isinstance(figures, dict) for row in figures]
        return environment.get_template("card.md.j2").render(
            card=self,
            windows=", ".join(f"{um:g}" for um in self.windows_um),
            tiles="" if tiles is None else describe_tiles(self.windows_um, tiles, self.encoder["input_px"]),
            rings=", ".join(f"{inner:g}–{outer:g}" for inner, outer in rings),
            training=_bullets(training),
            figures=lines,
            has_row=lambda start: any(row.startswith(start) for row in rows),
            block_bootstrap=BLOCK_BOOTSTRAP,
            paired=PAIRED,
            programmes=self._programmes(),
            spots=", ".join(f"{n} {name}" for name, n in (self.intervals or {}).get("spots", {}).items()),
        )

    def _programmes(self) -> list[str]:
        if self.programmes is None:
            return []
        sets = self.programmes["sets"]
        names = [name for name in next(iter(sets.values())) if name != "genes"]
        rows = [_row(name, [len(facts["genes"]), *(facts[n] for n in names)]) for name, facts in sets.items()]
        return [_row("set", ["genes", *names]), _row("---", ["---"] * (len(names) + 1)), *rows]


def set_genes(weights: Mapping[str, float]) -> str:
    """Write the genes of a set as one text, with weights other than 1: ``"ERBB2 GRB7:0.5"``."""
    return " ".join(gene if weights[gene] == 1 else f"{gene}:{weights[gene]:g}" for gene in sorted(weights))


def as_html(title: str, facts: dict[str, str]) -> str:
    """Return a small table for a notebook."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<strong>{escape(title)}</strong><table>{rows}</table>"


def _figures(protocol: str, figures: Any) -> list[str]:
    """Return the lines of one protocol: values per section as tables, others as a list."""
    if not isinstance(figures, dict):
        return _bullets({protocol: figures})
    tables: dict[tuple[str, ...], list[str]] = {}
    rest: dict[str, Any] = {}
    for name, values in figures.items():
        # Sections are columns; a row with fewer sections has empty cells.
        if isinstance(values, dict) and len(figures) > 1:
            columns = next((c for c in tables if set(values) <= set(c)), tuple(values))
            tables.setdefault(columns, []).append(_row(name, [values.get(column, "") for column in columns]))
        else:
            rest[name] = values
    lines = [f"### {protocol[:1].upper()}{protocol[1:]}", ""]
    for columns, rows in tables.items():
        lines += [_row("", columns), _row("---", ["---"] * len(columns)), *rows, ""]
    return [*lines, *_bullets(rest), *([""] if rest else [])]


def _row(name: str, values: Iterable[Any]) -> str:
    return f"| {' | '.join([name, *map(_cell, values)])} |"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _bullets(data: dict[str, Any], depth: int = 0) -> list[str]:
    lines = []
    for key, value in data.items():
        head = "  " * depth + f"- {key.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [head, *_bullets(value, depth + 1)]
        else:
            shown = ", ".join(str(v) for v in value) if isinstance(value, list | tuple) else value
            lines.append(f"{head}: {shown}")
    return lines
