"""Reference tasks that change on the way: at half of the run."""

import torch
from torch import Tensor, nn

from autolrs_plugin.benchmark.tasks.base import Batch, Problem
from autolrs_plugin.benchmark.tasks.images import DIGITS_TRAINED, TRAINED, convolutions, digits, drawn, mnist

CHANGE = 0.5


def _shifting(model: nn.Module, before: Batch, after: Batch, trained: int) -> Problem:
    """Return a problem whose data are others from the middle on."""

    def judged(data: Batch) -> list[Batch]:
        return [(data[0][trained:], data[1][trained:])]

    problem = Problem(model, drawn(*before, trained, 32), judged(before))

    def at(progress: float) -> None:
        data = after if progress >= CHANGE else before
        problem.draw, problem.validation = drawn(*data, trained, 32), judged(data)

    problem.at = at
    return problem


def mnist_shift(seed: int) -> Problem:
    """A convolutional network; from the middle on, images are negatives, upside down, and classes are renamed."""
    images, labels = mnist()
    model = convolutions(seed, nn.Identity(), 5, 256)
    return _shifting(model, (images, labels), (-images.flip(2), (labels * 3 + 1) % 10), TRAINED)


def digits_shift(seed: int) -> Problem:
    """Four layers without normalisation; from the middle on, images are mirrored and classes are renamed."""
    images, labels = digits()
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width_in in (64, 48, 48):
        layers += [nn.Linear(width_in, 48), nn.ReLU()]
    mirrored = images.reshape(-1, 8, 8).flip(2).reshape(-1, 64)
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    return _shifting(model, (images, labels), (mirrored, (labels + 3) % 10), DIGITS_TRAINED)


class Unfrozen(nn.Module):
    """A body that gets no gradient until it is `open`, and a head on top of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, 10)
        self.open = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.open and torch.is_grad_enabled()):
            features = self.body(x)
        return self.head(features)


def digits_unfreeze(seed: int) -> Problem:
    """A head alone in the first half; its random body joins in in the second."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = Unfrozen()

    def at(progress: float) -> None:
        model.open = progress >= CHANGE

    judged = [(images[DIGITS_TRAINED:], labels[DIGITS_TRAINED:])]
    return Problem(model, drawn(images, labels, DIGITS_TRAINED, 32), judged, at=at)
