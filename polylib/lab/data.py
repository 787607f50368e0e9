"""The data of the book: real sets that ship inside installed packages, and generators. Nothing is downloaded."""

import random
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polylib._checks import integer


class Split(NamedTuple):
    """A data set in two parts. Inputs are float32 `(samples, features)`; targets are int64 classes `(samples,)`.

    For language models both are int64 `(samples, length)`: symbols, and the symbols after them.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def features(self) -> int:
        return self.x_train.shape[1]

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    def to(self, device: torch.device | str) -> "Split":
        return Split(*(part.to(device) for part in self))


def _standardised(
    x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, each_feature: bool = True
) -> Split:
    """Subtract the mean of each feature; divide by its deviation, or by one for all. Both are of the training part."""
    mean = x_train.mean(0)
    deviation = (x_train - mean).std(0 if each_feature else None)
    train, test = (torch.tensor((x - mean) / deviation, dtype=torch.float32) for x in (x_train, x_test))
    return Split(train, torch.tensor(y_train).long(), test, torch.tensor(y_test).long())


def digits(train: int = 1200, seed: int = 0) -> Split:
    """Handwritten digits: 1,797 grey images of 8 x 8 pixels in ten classes, from scikit-learn (UCI).

    The mean image is subtracted, and all pixels are divided by one deviation. Dividing each pixel by its own would
    turn the few spots of ink at the border, where almost all images are blank, into outliers of more than thirty
    deviations.

    Args:
        train: how many of them, drawn by `seed`, form the training part; the others form the test part.
        seed: of the shuffle.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    train = integer("train", train, 1, len(x) - 1)
    order = np.random.default_rng(seed).permutation(len(x))
    first, rest = order[:train], order[train:]
    return _standardised(x[first], y[first], x[rest], y[rest], each_feature=False)


@lru_cache(maxsize=4)
def mnist1d(samples: int = 5000, seed: int = 42) -> Split:
    """MNIST-1D (Greydanus and Kobak, 2020): ten one-dimensional shapes, shifted, scaled, sheared and noisy.

    Each input is a signal of 40 values; four fifths of the `samples` form the training part. Linear models reach
    about 32 % on it, convolutional ones over 90 %, so that it tells architectures apart where digits can't. Takes
    some seconds to generate.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    samples = integer("samples", samples, 50)
    arguments = get_dataset_args()
    arguments.num_samples, arguments.seed = samples, seed
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator seeds the global generators
    try:
        data = make_dataset(arguments)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    return _standardised(data["x"], data["y"], data["x_test"], data["y_test"])


def shells(train: int = 2000, test: int = 2000, features: int = 8, classes: int = 4, seed: int = 0) -> Split:
    """Points on concentric spherical shells: the class is the shell, so only the distance from the origin tells it.

    Directions are uniform; the radius of class k is k + 1 plus Gaussian noise of deviation 0.15.
    """
    for name, value in (("train", train), ("test", test), ("features", features), ("classes", classes)):
        integer(name, value, 1)
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=train + test)
    direction = rng.standard_normal((train + test, features))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    x = direction * (y + 1 + 0.15 * rng.standard_normal(train + test))[:, None]
    return _standardised(x[:train], y[:train], x[train:], y[train:])


@lru_cache(maxsize=1)
def text() -> str:
    """About 480,000 characters of English: the language reference that ships inside CPython (`pydoc_data.topics`).

    Its length depends on the Python version, so build a vocabulary from what is returned.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@lru_cache(maxsize=4)
def text_windows(length: int = 32, train: int = 3200, test: int = 256, symbols: int = 60, seed: int = 0) -> Split:
    """Windows of `text()` for a language model of characters: inputs and targets are int64 `(samples, length)`.

    The target of each symbol is the one after it. The `symbols` most frequent characters are the vocabulary, and the
    others are left out. Training windows start at random places of the first nine tenths, drawn by `seed`; the test
    windows are spread evenly over the last tenth.
    """
    for name, value in (("length", length), ("train", train), ("test", test), ("symbols", symbols)):
        integer(name, value, 1)
    kept = sorted(character for character, _ in Counter(text()).most_common(symbols))
    number = {character: k for k, character in enumerate(kept)}
    tokens = torch.tensor([number[character] for character in text() if character in number])
    border, last = len(tokens) * 9 // 10, len(tokens) - length - 1
    length = integer("length", length, 1, len(tokens) // 20)
    places = torch.randint(border - length, (train,), generator=torch.Generator().manual_seed(seed))
    parts = []
    for starts in (places, torch.linspace(border, last, test).long()):
        window = tokens[starts[:, None] + torch.arange(length + 1)]
        parts += [window[:, :-1].clone(), window[:, 1:].clone()]
    return Split(*parts)
