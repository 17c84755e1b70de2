"""Networks that take their normalization layer as a function of the number of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]

MOST_BLOCKS = 1000  # of a `ResNet`; the deepest of He et al. 2016 has 600


def activated(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a norm and what follows it: ReLU, or nothing if it brings an activation itself."""
    brings = getattr(norm, "apply_act", False)  # timm's word for it
    return norm, nn.Identity() if brings else nn.ReLU(inplace=True)


class SimpleBlock(nn.Sequential):
    """(conv 3×3, norm, ReLU) × 2 and, unless ``pool`` is false, max-pool 2."""

    def __init__(self, channels_in: int, channels: int, norm: Norm, pool: bool = True) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, padding=1),
            *activated(norm(channels)),
            nn.Conv2d(channels, channels, 3, padding=1),
            *activated(norm(channels)),
            *([nn.MaxPool2d(2)] if pool else []),
        )


class SimpleNetV2(nn.Module):
    """The report's SimpleNetv2: three SimpleBlocks, FC ``hidden``, FC classes.

    ``image`` is (channels, height, width); ``channels`` are those of the blocks, in the report 32,
    64 and 128 before 1024 hidden units. The report's released code departs from its text in two
    ways: no third max-pool (``final_pool=False``), and dropout 0.2 but no ReLU after the hidden
    layer (``dropout=0.2, head_relu=False``).

    Raises:
        ValueError: if ``image`` is too small for the pools, there are not three positive numbers of
            channels or no hidden units, or ``init`` is unknown.
    """

    def __init__(
        self,
        norm: Norm,
        image: Sequence[int],
        classes: int,
        channels: Sequence[int],
        hidden: int,
        init: str = "torch",
        final_pool: bool = True,
        head_relu: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(channels) != 3 or min(channels) < 1:
            raise ValueError(f"channels={list(channels)}: give three positive numbers")
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: give a positive number")
        first, second, third = channels
        self.features = nn.Sequential(
            SimpleBlock(image[0], first, norm),
            SimpleBlock(first, second, norm),
            SimpleBlock(second, third, norm, pool=final_pool),
        )
        shrink = 8 if final_pool else 4
        height, width = image[1] // shrink, image[2] // shrink
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(_flat_features(third, height, width, image), hidden),
            *([nn.ReLU(inplace=True)] if head_relu else []),
            *([nn.Dropout(dropout)] if dropout else []),
            nn.Linear(hidden, classes),
        )
        initialize(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N,C,H,W) to logits (N,classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class SimpleNet(nn.Module):
    """The report's SimpleNet: conv 64, conv 256, pool, conv 512, pool, FC 512, FC classes.

    ``image`` is (channels, height, width). Dropout stands before the ReLU of FC 512.

    Raises:
        ValueError: if ``image`` is too small for the pools, or ``init`` is unknown.
    """

    def __init__(
        self,
        norm: Norm,
        image: Sequence[int],
        classes: int,
        init: str = "torch",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels, height, width = image

        def conv(channels_in: int, channels_out: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels_in, channels_out, 3, padding=1),
                *activated(norm(channels_out)),
            ]

        self.features = nn.Sequential(
            *conv(channels, 64),
            *conv(64, 256),
            nn.MaxPool2d(2),
            *conv(256, 512),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(_flat_features(512, height // 4, width // 4, image), 512),
            nn.Dropout(dropout),
            nn.ReLU(inplace=True),
            nn.Linear(512, classes),
        )
        initialize(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N,C,H,W) to logits (N,classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, padding=1, bias=False)
        self.norm1, self.act1 = activated(norm(width))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(channels_in, width, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose γ `ResNet` may zero."""
        return self.norm2

    def forward(self, x: Tensor) -> Tensor:
        """Map N,C,H,W to N,width,H/stride,W/stride."""
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        activated: Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut (He et al. 2016, figure 5 right).

    The stride is in the 3×3 convolution, as in torchvision and Wu & He's code.
    """

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        channels = width * self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.norm1, self.act1 = activated(norm(width))
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2, self.act2 = activated(norm(width))
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(channels_in, channels, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose γ `ResNet` may zero."""
        return self.norm3

    def forward(self, x: Tensor) -> Tensor:
        """Map N,C,H,W to N,4·width,H/stride,W/stride."""
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.act2(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        out += self.shortcut(x)
        activated: Tensor = self.relu(out)
        return activated


class ResNet(nn.Module):
    """Residual network (He et al. 2016, table 1) with a stem for small or for ImageNet images.

    ``image`` is (channels, height, width); ``layers`` counts the blocks of the four stages.
    ``zero_init_residual`` starts the last γ of every residual block at 0 (Goyal et al. 2017,
    section 5.1), whatever the norm.

    Raises:
        ValueError: if ``stem`` or ``init`` is unknown, or ``zero_init_residual`` is asked of a
            norm without γ.
    """

    def __init__(
        self,
        norm: Norm,
        image: Sequence[int],
        classes: int,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        stem: str = "cifar",
        init: str = "torch",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        stems = {"cifar": _cifar_stem, "imagenet": _imagenet_stem}
        if stem not in stems:
            raise ValueError(f"stem={stem}: choose one of {', '.join(stems)}")
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers={list(layers)}: give four positive block counts")
        if sum(layers) > MOST_BLOCKS:
            raise ValueError(f"layers={list(layers)}: give at most {MOST_BLOCKS} blocks in all")
        self.stem = stems[stem](image[0], norm)

        blocks: list[BasicBlock | Bottleneck] = []
        channels = 64
        for stage, count in enumerate(layers):
            width = 64 * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width, stride, norm))
                channels = width * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)
        initialize(self, init)
        if zero_init_residual:
            for residual in blocks:
                weight = getattr(residual.last_norm, "weight", None)
                if weight is None:
                    raise ValueError("zero_init_residual=true needs a norm with γ (affine)")
                nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N,C,H,W) to logits (N,classes)."""
        x = self.blocks(self.stem(x))
        # A mean, not AdaptiveAvgPool2d, whose CUDA backward is not deterministic.
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def initialize(model: nn.Module, init: str) -> None:
    """Initialize the weights of ``model`` in place.

    ``torch`` keeps what the layers drew (uniform, Kaiming with a = √5); ``he`` draws the weights
    of convolutions and linear layers from N(0, 2/fan_out) resp. N(0, 2/fan_in) and zeroes biases
    (He et al. 2015, section 2.2).

    Raises:
        ValueError: if ``init`` is unknown.
    """
    if init not in INITS:
        raise ValueError(f"init={init}: choose one of {', '.join(INITS)}")
    for module in model.modules():
        INITS[init](module)


def _keep(module: nn.Module) -> None:
    pass


def _he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        conv = isinstance(module, nn.Conv2d)
        nn.init.kaiming_normal_(
            module.weight, mode="fan_out" if conv else "fan_in", nonlinearity="relu"
        )
        if module.bias is not None:
            nn.init.zeros_(module.bias)


INITS: dict[str, Callable[[nn.Module], None]] = {"torch": _keep, "he": _he}


def _cifar_stem(channels: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1, bias=False), *activated(norm(64)))


def _imagenet_stem(channels: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
        *activated(norm(64)),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def _shortcut(channels_in: int, channels: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1 and channels_in == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))


def _flat_features(channels: int, height: int, width: int, image: Sequence[int]) -> int:
    if height < 1 or width < 1:
        raise ValueError(f"images of {image[1]}×{image[2]} pixels are too small for this network")
    return channels * height * width
