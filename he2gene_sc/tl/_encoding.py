"""Shared by predict and embed: the slides, how they are encoded, and stored features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from .._core import validate
from .._core.elements import Slide
from .._core.logs import logger
from .._core.placement import check_placement, check_windows
from .._core.slide import resolve
from .._settings import settings

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..inference import Encoder, Part, SpotFeatures, Workers
    from ..models import HE2Gene


class EncodingOptions(TypedDict, total=False):
    """Further keywords of :func:`predict` and :func:`embed`."""

    tta: bool | None
    batch_size: int
    dtype: str | torch.dtype
    lattice: float


@dataclass(frozen=True)
class Encoding:
    """Settings of the encoder for the spots of a slide."""

    device: torch.device
    dtype: torch.dtype
    tta: bool  # whether the eight symmetries of the square are averaged
    batch_size: int
    bar: bool  # whether a progress bar is shown
    step: float | None  # of the lattices of dense spots, as a share of the window; None: each spot is encoded

    @classmethod
    def checked(
        cls,
        model: HE2Gene,
        device: str | torch.device | None,
        show_progress_bar: bool | None,
        exact: bool,
        options: Mapping[str, Any],
        stored: Mapping[str, Any] | None = None,
    ) -> Encoding:
        """Create the settings; ``options`` are those of :class:`EncodingOptions`, after :func:`check_options`.

        Options that were not given are as in the record of ``stored`` features, if any.
        """
        import torch

        from ..inference import resolve_device, resolve_dtype

        resolved = resolve_device(settings.device if device is None else device)
        defaults = {"tta": model.card.tta, "lattice": 0.25} if stored is None else stored
        dtype, tta, step = options.get("dtype", "auto"), options.get("tta"), options.get("lattice")
        step = float(defaults["lattice"] if step is None else step)
        return cls(
            device=resolved,
            # Features that a GPU computed in float16 can be used on a CPU.
            dtype=getattr(torch, stored["dtype"]) if stored and dtype == "auto" else resolve_dtype(dtype, resolved),
            tta=bool(defaults["tta"] if tta is None else tta),
            batch_size=int(options.get("batch_size", 32)),
            bar=settings.show_progress_bar if show_progress_bar is None else show_progress_bar,
            step=None if exact or step == 0 else step,
        )

    def encoder(self, model: HE2Gene) -> Encoder:
        """Return the encoder of the model with these settings."""
        from ..inference import Encoder
        from ..models._network import SYMMETRIES

        symmetries = SYMMETRIES if self.tta else SYMMETRIES[:1]
        return Encoder(model.card.encoder["sha256"], symmetries, self.device, self.dtype)

    def facts(self, model: HE2Gene, interpolated: Sequence[str]) -> dict[str, Any]:
        """Return what a record states of the encoder; ``interpolated`` names elements with interpolated features."""
        return {
            "encoder": model.card.encoder["name"],
            "encoder_license": model.card.encoder["license"],
            "encoder_sha256": model.card.encoder["sha256"],
            "windows_um": [float(um) for um in model.card.windows_um],
            "tta": self.tta,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"interpolated": list(interpolated), "lattice_um": self.steps_um(model)} if interpolated else {}),
        }

    def steps_um(self, model: HE2Gene) -> list[float]:
        """Return the step of the lattice of each window, in µm."""
        return [float(f"{(self.step or 0) * um:.6g}") for um in model.card.windows_um]


def check_options(verb: str, options: Mapping[str, Any]) -> None:
    """Check the keyword arguments in ``options``, before anything is loaded."""
    valid = list(EncodingOptions.__annotations__)
    for name, value in options.items():
        if name not in valid:
            raise TypeError(
                f"`{name}` is not a parameter of hg.tl.{verb}; valid options: {valid}{validate.suggest(name, valid)}"
            )
        if name == "batch_size":
            validate.whole_number(value, name)
        elif name == "lattice":
            validate.in_range(value, name, above=0, most=1, what="a share of the window")


def find_slides(sdata: SpatialData, model: HE2Gene, **keys: Any) -> tuple[Slide, ...]:
    """Find the slides, and check that the model can read them; ``keys`` are those of :func:`resolve`."""
    slides = resolve(sdata, **keys)
    for slide in slides:
        check_windows(slide, model.card.windows_um)
        check_placement(sdata, slide)
    return slides


def parts_of(slide: Slide, model: HE2Gene, how: Encoding) -> tuple[Part, ...]:
    """Return all windows of the spots inside the image; for dense spots, each window at the nodes of a lattice."""
    from ..image import PatchReader, Pyramid, plan_windows
    from ..inference import Part, allocator, drop_idle_nodes, is_dense, lattice_of, n_readers

    extractor, windows = model.network.extractor, model.card.windows_um
    centres = slide.centres[slide.inside]

    def read(
        pyramid: Pyramid, points: np.ndarray, windows_um: tuple[float, ...], px: int | tuple[int, ...]
    ) -> PatchReader:
        return PatchReader(
            pyramid,
            points,
            slide.mpp,
            windows_um=windows_um,
            input_px=px,
            batch_size=how.batch_size,
            factor=slide.pixel_factor,
            allocate=allocator(how.device),
            n_readers=n_readers(how.device, settings.n_readers),
        )

    if how.step is not None and is_dense(centres * slide.mpp, windows):
        lattices = [drop_idle_nodes(*lattice_of(centres, how.step * um / slide.mpp), centres) for um in windows]
        if sum(len(nodes) for nodes, _ in lattices) < len(windows) * len(centres):
            # Read each window from the level at which all windows together would be read.
            level = plan_windows(slide.pyramid, slide.mpp, windows, extractor.window_px).level
            pyramid = Pyramid(slide.pyramid.levels[: level + 1])
            extractors = [extractor.single_window(i) for i in range(len(windows))]
            sides = [own.window_px if isinstance(own.window_px, int) else own.window_px[0] for own in extractors]
            return tuple(
                Part(own, read(pyramid, nodes, (um,), side), weights)
                for own, (nodes, weights), um, side in zip(extractors, lattices, windows, sides, strict=True)
            )
    return (Part(extractor, read(slide.pyramid, centres, windows, extractor.window_px)),)


def is_interpolated(parts: tuple[Part, ...]) -> bool:
    """Return whether features are interpolated from lattices."""
    return parts[0].weights is not None


def encode_slide(
    slide: Slide,
    model: HE2Gene,
    how: Encoding,
    parts: tuple[Part, ...],
    folder: Path | None,
    workers: Workers | None = None,
) -> tuple[SpotFeatures, dict[str, str]]:
    """Return the features of spots inside the image, encoded or from a folder, and the facts that they depend on."""
    from tqdm.auto import tqdm

    from ..inference import read_features

    total, unit = sum(part.reader.n_spots for part in parts), "spot"
    if is_interpolated(parts):
        n, unit = int(slide.inside.sum()), "patch"
        steps = ", ".join(f"{um:g}" for um in how.steps_um(model))
        logger.info(
            "%s: %d spots are closer than half a window: features are interpolated from %d patches on lattices of %s µm; "
            "exact=True encodes %d",
            *(slide.shapes_key, n, total, steps, n * len(parts)),
        )
    with tqdm(total=total, unit=unit, desc=f"encode {slide.shapes_key}", disable=not how.bar) as bar:
        return read_features(
            parts,
            how.encoder(model),
            slide.centres[slide.inside] * slide.mpp,
            folder=folder,
            progress=bar.update,
            workers=workers,
        )


@dataclass(frozen=True)
class KeptFeatures:
    """Features that embed wrote to ``obsm`` of a table."""

    table: AnnData
    key: str
    record: Mapping[str, Any]

    def of_slide(self, slide: Slide, parts: tuple[Part, ...], encoder: Encoder) -> SpotFeatures:
        """Return the features of the spots of a slide; raise if they are of other pixels or another encoder."""
        from ..inference import SpotFeatures, differences, read_pixels

        kept = self.record["facts"].get(slide.shapes_key)
        if kept is None:
            raise ValueError(
                f"`features` {self.key!r} are of shapes {sorted(self.record['facts'])}, not of {slide.shapes_key!r}; {self._remedy}"
            )
        pixels, facts = read_pixels(parts, encoder)
        changes = differences(kept, facts)
        if changes:
            raise ValueError(
                f"`features` {self.key!r} are not those of this slide and model; they differ in {', '.join(changes)}. {self._remedy}"
            )
        values = np.asarray(self.table.obsm[self.key], np.float32)[slide.rows[slide.inside]]
        views = values.reshape(len(values), int(self.record["n_views"]), -1)
        return SpotFeatures(views, pixels, slide.centres[slide.inside] * slide.mpp)

    @property
    def _remedy(self) -> str:
        return f"Compute them again: hg.tl.embed(sdata, model=..., key_added={self.key.removeprefix('X_')!r})"
