"""Image data that fits in memory as bytes: split, normalisation, augmentation, batches.

There is no DataLoader: a batch is one index operation on a tensor, which takes less time than handing images from worker
to worker. Nothing here reads files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor

from search.data.contract import digest
from spaces.errors import UserError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """All images of a data set, and which of them are for what.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        train: indices into both, int64; disjoint from the other two.
        val: likewise.
        test: likewise.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


def stratified_split(labels: Indices, shares: Mapping[str, float], seed: int) -> dict[str, Indices]:
    """Takes parts out of N items at random, every class at the same share to within an item or two.

    Args:
        labels: int64 [N].
        shares: of all items, by the name of the part; the rest is the part `train`. Sizes are `round(share * N)`.
        seed: equal seeds give equal parts.

    Returns:
        Sorted indices by the name of the part.

    Raises:
        UserError: a share is not between 0 and 1, or a part has no item.
    """
    if seed < 0:
        raise UserError(f"seed={seed} is not possible; pass a whole number from 0 on")
    for name, share in shares.items():
        if not 0 < share < 1:
            raise UserError(f"{name}_share={share} is not possible; pass data.module.{name}_share between 0 and 1")
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within a class
    parts: dict[str, Indices] = {}
    for name, share in shares.items():
        count = min(round(share * len(labels)), len(order))
        # Evenly spaced places in an order by class meet every class in proportion and give the exact size.
        places = ((np.arange(count) + 0.5) * len(order) / max(count, 1)).astype(np.int64)
        parts[name] = np.sort(order[places])
        order = np.delete(order, places)
    parts["train"] = np.sort(order)
    for name, part in parts.items():
        if not len(part):
            given = ", ".join(f"{key}_share={share}" for key, share in shares.items())
            raise UserError(
                f"{given} of {len(labels)} images leaves {name} without an image; change data.module.*_share or give more"
            )
    return parts


def shift_and_flip(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Moves every image by its own random offset of up to `shift` pixels in each direction, and mirrors every second one.

    Moving is the same as padding with zeros (black) and cropping.

    Args:
        images: [N, C, H, W]; any dtype.
        shift: the largest offset, in pixels; 0 for none.
        flip: mirror left to right with probability 1/2.
        generator: where the random numbers come from.

    Returns:
        Tensor of the same shape and dtype.
    """
    if not shift and not flip:
        return images
    n, channels, height, width = images.shape
    device = images.device  # what is drawn does not depend on it
    rows, columns = (torch.arange(size, device=device).expand(n, -1) for size in (height, width))
    if flip:
        columns = torch.where((torch.rand(n, 1, generator=generator) < 0.5).to(device), columns.flip(1), columns)
    if shift:
        offsets = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator).to(device)
        rows, columns = rows + offsets[0], columns + offsets[1]
        images = F.pad(images, (shift, shift, shift, shift))
    pixels = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).reshape(n, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, pixels).view(n, channels, height, width)


class Batches:
    """The batches of one part, an iterable that Lightning takes in the place of a DataLoader.

    N images come in `ceil(N / batch_size)` batches that differ in size by at most one image: no image is dropped, and batch
    normalisation never meets a small last batch.

    An epoch of training depends only on the state of torch's global random generator at its first batch: the generator
    gives one number, from which order and augmentation follow, whatever else draws from it between two batches. Iterating
    for evaluation goes in order and draws nothing.

    While a trainer trains on several processes, batches are larger by their number, and each process gets its part of every
    batch: order and augmentation are those of one process with the larger batch.
    """

    def __init__(self, module: InMemoryImages, indices: Tensor, *, training: bool) -> None:
        if module.batch_size < 1:
            raise UserError(f"batch_size={module.batch_size} is not possible; pass data.module.batch_size=1 or more")
        self.module = module
        self.indices = indices
        self.training = training
        self.batch_size = module.batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.indices) // (self.batch_size * self.share()[1]))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Lightning calls iter() before on_train_epoch_start in the first epoch of a run and after it in the others. This is
        # a generator function, so that the seed is drawn with the first batch, in either case after the hook.
        indices, module = self.indices, self.module
        if self.training:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            indices = indices[torch.randperm(len(indices), generator=generator)]
        rank, ranks = self.share()
        whole, labels = (tensor.to(self.device()) for tensor in (module.labelled.images, module.labelled.labels))
        for chunk in indices.to(self.device()).tensor_split(len(self)):
            images = whole.index_select(0, chunk)  # ten times as fast as [chunk]
            if self.training:
                images = shift_and_flip(images, module.shift, module.flip, generator)
                images, chunk = images.tensor_split(ranks)[rank], chunk.tensor_split(ranks)[rank]
            yield module.normalise(images), labels.index_select(0, chunk)

    def share(self) -> tuple[int, int]:
        """Of each batch, the part that this process trains on, and in how many it is cut; the whole outside of training."""
        trainer = self._trainer()
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def device(self) -> torch.device:
        """Where batches are made: where a trainer trains, so that a GPU gets the images once an epoch and augments itself."""
        trainer = self._trainer()
        return torch.device("cpu") if trainer is None else trainer.strategy.root_device

    def _trainer(self) -> Trainer | None:
        trainer = self.module.trainer
        return trainer if self.training and trainer is not None and trainer.training else None


class InMemoryImages(LightningDataModule, ABC):
    """A data module over images in memory. A subclass defines `load` and `source`.

    Files are read in `setup`, which Lightning calls, or at the first use of the data; building the module reads nothing.

    Args:
        batch_size: images in a batch, at most.
        seed: of the split. Order and augmentation come from torch's global generator.
        shift: augmentation of training images, see `shift_and_flip`.
        flip: likewise.
    """

    white = 255
    """The pixel value that is 1.0 before normalisation."""

    def __init__(self, *, batch_size: int, seed: int, shift: int, flip: bool) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.shift = shift
        self.flip = flip

    @abstractmethod
    def load(self) -> LabelledImages:
        """Reads the data.

        Raises:
            UserError: the data is not there or not as it should be.
        """

    @abstractmethod
    def source(self) -> Mapping[str, object]:
        """What the data comes from and how it is read: JSON values that differ when the data differs."""

    @cached_property
    def labelled(self) -> LabelledImages:
        """The data, read once."""
        return self.load()

    @cached_property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training images by channel, each float32 [C], on the scale where white is 1."""
        images, train = self.labelled.images, self.labelled.train
        counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
        for chunk in train.tensor_split(-(-len(train) // 4096)):
            for channel, values in enumerate(images.index_select(0, chunk).unbind(1)):
                counts[channel] += torch.bincount(values.flatten(), minlength=256)
        shares = counts.double() / counts.sum(1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64) / self.white
        mean = shares @ levels
        std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
        std[std == 0] = 1.0  # a channel that never varies
        return mean.float(), std.float()

    @property
    def preprocessing(self) -> dict[str, object]:
        """What an application does to pixels before it runs a network: `(pixel / white - mean) / std` by channel."""
        mean, std = self.mean_and_std
        return {"white": self.white, "mean": mean.tolist(), "std": std.tolist()}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images by part."""
        return {name: len(getattr(self.labelled, name)) for name in ("train", "val", "test")}

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32 [N, C, H, W]."""
        mean, std = (value[:, None, None].to(images.device) * self.white for value in self.mean_and_std)
        return images.float().sub_(mean).div_(std)

    def fingerprint(self) -> str:
        """See `search.data.fingerprint`."""
        settings = {"seed": self.seed, "batch_size": self.batch_size, "shift": self.shift, "flip": self.flip}
        return digest([type(self).__qualname__, settings, dict(self.source())])

    def __str__(self) -> str:
        # Lightning's own builds the data loaders, hence reads the data, and knows only DataLoader.
        return f"{type(self).__name__}({self.sizes if 'labelled' in vars(self) else 'not read yet'})"

    def setup(self, stage: str | None = None) -> None:
        _ = self.labelled

    def train_dataloader(self) -> Batches:
        return Batches(self, self.labelled.train, training=True)

    def val_dataloader(self) -> Batches:
        return Batches(self, self.labelled.val, training=False)

    def test_dataloader(self) -> Batches:
        return Batches(self, self.labelled.test, training=False)
