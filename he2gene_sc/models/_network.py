"""Network: encoder → features of the windows and their colour → embedding → {gene head, annotation head}."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import platform
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ._embedding import NO_CONTEXT, TENSORS, Basis, Context, Rows, rings_of, row_blocks
from ._encoders.registry import EncoderSpec
from ._encoders.stages import wrap_stages
from ._ood import OODDetector

#: Arrays of the :class:`Basis` of an annotation with its own components.
_ANNOTATION = ("annotation.mean", "annotation.scale", "annotation.projection", "annotation.weight")

#: Most genes and most values that the gene head computes at once, so that no second copy of the result is needed.
_GENES_AT_ONCE, _VALUES_AT_ONCE = 4096, 2**24
#: The eight symmetries of the square, as (quarter turns, mirrored).
SYMMETRIES = tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4))
#: Options of glibc's allocator (mmap threshold, trim threshold, top pad), with values by which large arrays stay in the process,
#: and values that glibc's dynamic thresholds reach in a process that allocates large arrays.
_MALLOPT = {-3: (2**30, 2**25), -1: (2**30, 2**26), -2: (2**28, 2**17)}


class Preprocess(nn.Module):
    """Converts uint8 patches of any size to the input of the encoder: resized (antialiased), normalised, channels last."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.input_px = spec.input_px
        self.interpolation = spec.interpolation
        self.register_buffer("shift", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(spec.std).view(1, 3, 1, 1)), persistent=False)

    def forward(self, patches: torch.Tensor, times: int = 1) -> torch.Tensor:
        """Map ``(b, 3, s, s)`` uint8 to float32, with ``times`` the side of the input."""
        x = patches.contiguous(memory_format=torch.channels_last)
        side = times * self.input_px
        if x.shape[-1] != side:
            size = (side, side)
            if x.device.type == "cuda":
                # CUDA has no uint8 kernel; rounding makes the result equal to that of the CPU.
                x = F.interpolate(x.float(), size=size, mode=self.interpolation, antialias=True).round_().clamp_(0, 255)
            else:
                # Apple's MPS has no antialiased kernel, so the CPU resizes.
                x = F.interpolate(x.cpu(), size=size, mode=self.interpolation, antialias=True).to(x.device)
        return torch.sub(x, self.shift).mul_(self.scale)


class FeatureExtractor(nn.Module):
    """Computes the features of spots: encoder features of each window, and its optical density, in which stains are additive.

    ``fusion="concat"`` concatenates windows and colours; with ``"mean"`` each window is a view, and there are no colours.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        spec: EncoderSpec,
        *,
        fusion: str = "concat",
        stages: tuple[int, ...] | None = None,
        tiles: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.fusion, self.tiles = fusion, tiles
        self.preprocess = Preprocess(spec)
        fused = fuse_batch_norm(encoder, spec.input_px).to(memory_format=torch.channels_last)
        self.encoder = wrap_stages(fused, stages)
        self.input_px = spec.input_px
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)
        self.requires_grad_(False).eval()

    def single_window(self, i: int) -> FeatureExtractor:
        """Return an extractor of only one window, which shares the encoder."""
        single = copy.copy(self)
        single.tiles = None if self.tiles is None else self.tiles[i : i + 1]
        return single

    @property
    def window_px(self) -> int | tuple[int, ...]:
        """Side to which windows are resized: one value for all, or one per window."""
        return self.input_px if self.tiles is None else tuple(n * self.input_px for n in self.tiles)

    def forward(
        self, patches: tuple[torch.Tensor, ...], symmetries: tuple[tuple[int, bool], ...] = ((0, False),)
    ) -> torch.Tensor:
        """Encode uint8 patches ``(b, 3, s, s)`` of ``w`` windows in ``r`` symmetries, float32.

        With ``"concat"`` the result is ``(b, r, w·f + w·N_COLOUR)``, features before colours; with ``"mean"`` the views
        ``(b, r·w, f)``.
        """
        n = len(patches)
        x = torch.cat([self.preprocess(window) for window in patches])
        if self.tiles is None:
            encoded = [self.encoder(apply_symmetry(x, *symmetry)).float().chunk(n) for symmetry in symmetries]
        else:
            encoded = [self._encode_tiles(patches, symmetry) for symmetry in symmetries]
        if self.fusion == "mean":
            return torch.stack([window for windows in encoded for window in windows], dim=1)
        colour = self._colour(x, n)
        return torch.stack([torch.cat([*windows, colour], dim=1) for windows in encoded], dim=1)

    def _encode_tiles(self, patches: tuple[torch.Tensor, ...], symmetry: tuple[int, bool]) -> list[torch.Tensor]:
        """Return mean features over the tiles of each window, one tile at a time so that batches do not grow."""
        found = []
        for window, n in zip(patches, self.tiles or (), strict=True):
            x = self.preprocess(window, n)
            tiles = [part for row in x.chunk(n, dim=2) for part in row.chunk(n, dim=3)]
            total = sum(
                self.encoder(apply_symmetry(tile.contiguous(memory_format=torch.channels_last), *symmetry)).float()
                for tile in tiles
            )
            found.append(total / len(tiles))
        return found

    def colour(self, patches: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return only the colour features, ``(b, w·N_COLOUR)`` float32, without running the encoder."""
        return self._colour(torch.cat([self.preprocess(window) for window in patches]), len(patches))

    def fingerprint(self) -> list[float]:
        """Describe the output for a patch of noise: length and direction on eight random axes, to two digits."""
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((1, 3, self.input_px, self.input_px)).astype(np.float32)
        with torch.inference_mode():
            found = self.encoder(torch.from_numpy(noise).to(self.mean.device)).double().cpu().numpy().ravel()
        length = float(np.linalg.norm(found))
        if not np.isfinite(length) or not length:
            return [0.0]
        axes = rng.standard_normal((8, len(found)))
        return [float(f"{length:.2g}"), *(float(f"{x:.1f}") + 0.0 for x in axes @ found / length)]

    def _colour(self, x: torch.Tensor, n_windows: int) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            intensity = x.float().permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]) * self.std + self.mean
            density = intensity.clamp_(min=1 / 255).log_().neg_()
            mean = density.mean(1)
            # Matrix multiplication is three times as fast as torch.std_mean on channels last.
            square = torch.bmm(density.transpose(1, 2), density) / density.shape[1]
            covariance = square - mean.unsqueeze(2) * mean.unsqueeze(1)
            sd = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
            covariances = covariance[:, (0, 0, 1), (1, 2, 2)]
            return torch.cat(torch.cat([mean, sd, covariances], dim=1).chunk(n_windows), dim=1)


class Network(nn.Module):
    """Feature extractor and heads.

    ``tensors`` has ``genes.*``, ``annotation.*`` divided by the temperature, and ``latent.*`` and ``annotation.*`` of a Basis.
    """

    genes_weight: torch.Tensor
    genes_bias: torch.Tensor
    annotation_weight: torch.Tensor
    annotation_bias: torch.Tensor

    def __init__(
        self,
        extractor: FeatureExtractor,
        tensors: dict[str, torch.Tensor],
        context: Context,
        detector: OODDetector | None = None,
        annotation_context: Context = NO_CONTEXT,
    ):
        super().__init__()
        self.extractor = extractor
        self.detector = detector
        self.has_annotation = "annotation.weight" in tensors
        for name in ("genes.weight", "genes.bias", "annotation.weight", "annotation.bias"):
            if name in tensors:
                self.register_buffer(name.replace(".", "_"), tensors[name].float())
        self.basis: Basis | None = None
        self.annotation_basis: Basis | None = None
        if TENSORS[0] in tensors:
            self.basis = _basis(tensors, TENSORS, context)
        if _ANNOTATION[0] in tensors:
            self.annotation_basis = _basis(tensors, _ANNOTATION, annotation_context)

    @property
    def n_latent(self) -> int:
        """Length of the embedding."""
        return self.genes_weight.shape[0]

    def embed(self, features: Rows, centres_um: np.ndarray, mpp: float) -> np.ndarray:
        """Embed all spots of one slide: ``(n, f)`` averaged over symmetries, to ``(n, k)`` float32, weighted for its µm/px."""
        if self.basis is None:
            return features[: len(features)]
        found = self.basis.embed(features, rings_of(centres_um, self.basis.context.rings_um))
        found *= self.basis.column_weights(mpp)
        return found

    def classify(self, features: Rows, centres_um: np.ndarray, latent: torch.Tensor) -> np.ndarray:
        """Return class probabilities of all spots of one slide, ``(n, c)`` float32; ``latent`` is the result of :meth:`embed`."""
        if self.annotation_basis is None:
            return self.annotation(latent).cpu().numpy()
        rings = rings_of(centres_um, self.annotation_basis.context.rings_um)
        logits = torch.from_numpy(self.annotation_basis.embed(features, rings)) + self.annotation_bias.cpu()
        return torch.softmax(logits, dim=-1).numpy()

    def expression(self, latent: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
        """Predict the genes at the positions ``genes``: ``(b, k)`` to ``(b, len(genes))``, floored at 0."""
        return (latent @ self.genes_weight[:, genes] + self.genes_bias[genes]).clamp_(min=0)

    def expression_blocks(self, latent: torch.Tensor, genes: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Yield a slice of spots, a slice of ``genes`` ``(g,)`` and their predicted values, in bounded memory; ``latent`` is ``(n, k)``."""
        positions = torch.from_numpy(np.asarray(genes, np.int64))
        for start in range(0, len(genes), _GENES_AT_ONCE):
            part = positions[start : start + _GENES_AT_ONCE].to(self.genes_bias.device)
            for rows in row_blocks(len(latent), _VALUES_AT_ONCE // len(part)):
                # The yield is outside: otherwise the caller would run in inference mode.
                with torch.inference_mode():
                    found = self.expression(latent[rows].to(part.device), part).cpu().numpy()
                yield rows, slice(start, start + len(part)), found

    def annotation(self, latent: torch.Tensor) -> torch.Tensor:
        """Predict class probabilities, ``(…, k)`` to ``(…, c)``; the caller averages those of several views."""
        return torch.softmax(latent @ self.annotation_weight + self.annotation_bias, dim=-1)


def _basis(tensors: dict[str, torch.Tensor], names: tuple[str, ...], context: Context) -> Basis:
    mean, scale, projection, mixing = (tensors[name].float().numpy() for name in names)
    return Basis(mean, scale, projection, mixing, context)


def apply_symmetry(x: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    """Rotate images ``(b, c, h, w)`` by quarter turns, then mirror them if ``mirrored``."""
    if turns == 0 and not mirrored:
        return x
    x = torch.rot90(x, turns, dims=(2, 3))
    return (x.flip(3) if mirrored else x).contiguous(memory_format=torch.channels_last)


def fuse_batch_norm(encoder: nn.Module, input_px: int) -> nn.Module:
    """Fold batch normalisations after convolutions into these; return the encoder in evaluation mode.

    Pairs are found in the order of declaration. The original is returned if the result for a random image differs.
    """
    # A transformer has nothing to fuse, and a copy of its weights may be large.
    if not any(_pairs(module) for module in encoder.modules()):
        return encoder
    # `eval` also for the original: in training mode the comparison would change its statistics.
    fused = copy.deepcopy(encoder.eval())
    for module in list(fused.modules()):
        for conv, norm in _pairs(module):
            together = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            # timm's normalisation layers carry the activation.
            setattr(module, norm, getattr(getattr(module, norm), "act", nn.Identity()))
            setattr(module, conv, together)
    x = torch.rand(1, 3, input_px, input_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, found = encoder(x), fused(x)
    return fused if torch.allclose(expected, found, rtol=1e-3, atol=1e-3) else encoder


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of children that are a convolution followed by its normalisation."""
    children = list(module.named_children())
    return [
        (conv_name, norm_name)
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features
    ]


@contextlib.contextmanager
def keep_heap(device: str = "cpu") -> Iterator[None]:
    """Let glibc reuse the large arrays that a network on the CPU frees, and return them to the system afterwards.

    Mapping arrays above 32 MB anew takes longer than the convolutions (``tests/benchmarks/bench_predict.py``).
    """
    if device != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for option, (large, _) in _MALLOPT.items():
        libc.mallopt(option, large)
    try:
        yield
    finally:
        for option, (_, default) in _MALLOPT.items():
            libc.mallopt(option, default)
        libc.malloc_trim(0)
