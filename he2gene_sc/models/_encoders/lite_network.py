"""EfficientNet-Lite0 as timm builds it, without the import of timm, which takes seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

#: Kernel, stride, expansion, channels and number of blocks of each stage.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM, _HEAD = 32, 1280


class _SameConv(nn.Conv2d):
    """Convolution of stride 2 with the padding of TensorFlow: an odd pixel is added at the end."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pad and convolve."""
        (kernel, _), (step, _) = self.kernel_size, self.stride
        rows, columns = (max((-(-n // step) - 1) * step + kernel - n, 0) for n in input.shape[-2:])
        x = F.pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    kind, padding = (nn.Conv2d, kernel // 2) if stride == 1 else (_SameConv, 0)
    conv = kind(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 * groups / (kernel**2 * outputs)))
    return conv


class _Norm(nn.BatchNorm2d):
    """Batch normalisation, followed by the activation except at the end of a block."""

    def __init__(self, channels: int, *, active: bool = True):
        super().__init__(channels, eps=1e-3)
        self.act = nn.ReLU6(inplace=True) if active else nn.Identity()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise and activate."""
        return self.act(super().forward(input))


class _Block(nn.Sequential):
    """Convolutions, each with its normalisation, and a residual connection if input and output have the same shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        self.has_residual = stride == 1 and inputs == outputs
        inner = inputs * expansion
        # Names are those of timm, so that weights can be loaded.
        if expansion > 1:
            self.conv_pw, self.bn1 = _conv(inputs, inner), _Norm(inner)
        last, n = ("conv_pwl", 2) if expansion > 1 else ("conv_pw", 1)
        self.conv_dw = _conv(inner, inner, kernel, stride, groups=inner)
        self.add_module(f"bn{n}", _Norm(inner))
        self.add_module(last, _conv(inner, outputs))
        self.add_module(f"bn{n + 1}", _Norm(outputs, active=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(b, inputs, h, w)`` to ``(b, outputs, h / stride, w / stride)``."""
        found = super().forward(input)
        return found + input if self.has_residual else found


class EfficientNetLite0(nn.Module):
    """Equals ``timm.create_model("tf_efficientnet_lite0", num_classes=0)``: the same names of weights and the same results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = _conv(3, _STEM, 3, stride=2), _Norm(_STEM)
        inputs, blocks = _STEM, []
        for kernel, stride, expansion, outputs, n in _STAGES:
            sizes = [inputs] + [outputs] * (n - 1)
            blocks.append(
                nn.Sequential(
                    *(_Block(size, outputs, kernel, stride if i == 0 else 1, expansion) for i, size in enumerate(sizes))
                )
            )
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn2 = _conv(inputs, _HEAD), _Norm(_HEAD)
        # Last stage of each resolution.
        self.stage_ends = (1, 2, 3, 5, 7)
        self.feature_info = [
            {"stage": end, "reduction": 2 ** (i + 1), "module": f"blocks.{end - 1}", "num_chs": _STAGES[end - 1][3]}
            for i, end in enumerate(self.stage_ends)
        ]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Sequence[int] = range(5),
        *,
        stop_early: bool = True,
        intermediates_only: bool = True,
    ) -> list[torch.Tensor]:
        """Return the maps of some entries of ``feature_info``; later stages are not run."""
        wanted = [self.stage_ends[i] for i in indices]
        x, found = self.bn1(self.conv_stem(x)), []
        for number, stage in enumerate(self.blocks[: max(wanted)], start=1):
            x = stage(x)
            if number in wanted:
                found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(b, 3, s, s)`` to ``(b, 1280)``."""
        x = self.blocks(self.bn1(self.conv_stem(x)))
        return self.bn2(self.conv_head(x)).mean((2, 3))
