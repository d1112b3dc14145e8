"""Images in folders, one folder for each class."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from search.data.contract import files_digest
from search.data.decode import CHUNK_IMAGES, allocate, decode_all
from search.data.memory import Indices, InMemoryImages, LabelledImages, stratified_split
from spaces.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
PARTS = ("train", "val", "test")


class ImageFolder(InMemoryImages):
    """Images from `PATH/CLASS/*.png` (or jpg, bmp, webp), or from `PATH/train/CLASS/*`, `PATH/val/...`, `PATH/test/...`.

    The second layout is taken when the folders of PATH are `train` and none but `val` and `test` beside it; of these two, a
    missing one is split off the training images. Classes are numbered in sorted order of their names. Hidden entries, files
    of other kinds and folders within a class are passed over. A link that leaves PATH is an error, not followed.

    Args:
        path: the folder, PATH above.
        channels: 1 or 3; images of the other kind are converted.
        classes: number of class folders.
        size: height and width to which images are brought, in pixels; the shape is kept by cutting off the longer sides.
        val_share: share of the images that is for validation, where that has no folder.
        test_share: share of the images that is for the test of the winners, where that has no folder.
        batch_size: images in a batch, at most.
        seed: of the split.
        shift: training images are moved by up to so many pixels; 0 for none.
        flip: training images are mirrored at random.
    """

    def __init__(
        self,
        path: str,
        *,
        classes: int,
        channels: int = 3,
        size: int = 64,
        val_share: float = 0.1,
        test_share: float = 0.1,
        batch_size: int = 64,
        seed: int = 0,
        shift: int = 4,
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, shift=shift, flip=flip)
        self.root = Path(path).expanduser().absolute()
        self.channels, self.classes, self.size = channels, classes, size
        self.shares = {"val": val_share, "test": test_share}

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return [folder.name for folder in self._folders(self._part_folders.get("train", self.root))]

    def load(self) -> LabelledImages:
        parts: dict[str, Indices] = {}
        paths: list[Path] = []
        labels: list[int] = []
        for part, found in self._files.items():
            parts[part] = np.arange(len(paths), len(paths) + len(found))
            paths += [path for path, _ in found]
            labels += [label for _, label in found]
        shares = {part: share for part, share in self.shares.items() if part not in parts}
        parts |= stratified_split(np.array(labels[: len(parts["train"])]), shares, self.seed)
        images = allocate(len(paths), self.channels, self.size)
        chunks = (paths[start : start + CHUNK_IMAGES] for start in range(0, len(paths), CHUNK_IMAGES))
        decode_all(chunks, images, lambda index: str(paths[index]))
        indices = {name: torch.from_numpy(part) for name, part in parts.items()}
        return LabelledImages(torch.from_numpy(images), torch.tensor(labels), **indices)

    def source(self) -> Mapping[str, object]:
        paths = [path for found in self._files.values() for path, _ in found]
        return {
            "files": files_digest(paths, self.root),
            "read": [self.channels, self.classes, self.size],
            "shares": self.shares,
        }

    @cached_property
    def _part_folders(self) -> dict[str, Path]:
        """The folders of the parts, by name; empty when the folders are classes."""
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise UserError(f"data.path={self.root} {what}; pass data.path=FOLDER with one folder of images for each class")
        folders = {folder.name: folder for folder in self._folders(self.root)}
        return folders if "train" in folders and folders.keys() <= set(PARTS) else {}

    @cached_property
    def _files(self) -> dict[str, list[tuple[Path, int]]]:
        """Image files and their labels, by part; all are `train` when there is no folder for each part."""
        names = self.class_names
        if not names:
            raise UserError(f"{self._part_folders.get('train', self.root)} has no class folder; put one in for each class")
        if len(names) != self.classes:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"{self.root} has {len(names)} classes ({shown}), not {self.classes}; pass data.classes={len(names)}"
            )
        found: dict[str, list[tuple[Path, int]]] = {}
        for part, folder in (self._part_folders or {"train": self.root}).items():
            found[part] = []
            for class_folder in self._folders(folder):
                if class_folder.name not in names:
                    raise UserError(
                        f"{class_folder} is a class that {self._part_folders['train']} does not have; remove or rename it"
                    )
                label = names.index(class_folder.name)
                images = [path for path in self._entries(class_folder) if path.suffix.lower() in SUFFIXES and path.is_file()]
                if not images:
                    raise UserError(f"{class_folder} has no image ({', '.join(SUFFIXES)}); put some in or remove the folder")
                found[part] += [(path, label) for path in images]
            if not found[part]:
                raise UserError(f"{folder} has no class folder; put one in for each class or remove it")
        return found

    def _folders(self, folder: Path) -> list[Path]:
        return [path for path in self._entries(folder) if path.is_dir()]

    def _entries(self, folder: Path) -> list[Path]:
        """What is in a folder, sorted by name."""
        try:
            entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}; make it readable") from error
        for path in entries:
            if path.is_symlink() and not path.resolve().is_relative_to(self._resolved_root):
                raise UserError(f"{path} is a link that leaves {self.root}; put the files themselves there or remove the link")
        return entries

    @cached_property
    def _resolved_root(self) -> Path:
        return self.root.resolve()
