"""The handwritten digits that come with scikit-learn: a data set for a search of minutes, without a download."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.datasets import load_digits

from search.data.memory import InMemoryImages, LabelledImages, stratified_split


class Digits(InMemoryImages):
    """1,797 grey images of 8x8 pixels in 10 classes (UCI optical recognition of handwritten digits, its test half).

    With the default shares: 1,079 for training, 359 for validation, 359 for test.

    Args:
        batch_size: images in a batch, at most.
        seed: of the split.
        val_share: share of all images that is for validation.
        test_share: share of all images that is for the test of the winners.
        shift: training images are moved by up to so many pixels.
    """

    white = 16

    def __init__(
        self, batch_size: int = 128, seed: int = 0, val_share: float = 0.2, test_share: float = 0.2, shift: int = 1
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, shift=shift, flip=False)  # a mirrored digit is no digit
        self.shares = {"val": val_share, "test": test_share}

    def load(self) -> LabelledImages:
        digits = load_digits()
        labels = digits.target.astype(np.int64)
        parts = stratified_split(labels, self.shares, self.seed)
        images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
        return LabelledImages(images, torch.from_numpy(labels), **{k: torch.from_numpy(part) for k, part in parts.items()})

    def source(self) -> Mapping[str, object]:
        return {"shares": self.shares}
