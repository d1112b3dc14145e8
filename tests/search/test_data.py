"""The data of a search: splits, batches, augmentation, readers, and one clear line for everything a user can get wrong."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from search.data import Digits, ImageFolder, InMemoryImages, ParquetImages, check_batch, fingerprint
from search.data.decode import decode_image
from search.data.memory import shift_and_flip, stratified_split
from spaces.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def picture(index: int, size: int = 8) -> np.ndarray:
    """An RGB image that tells its index in every pixel of its red channel."""
    pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[..., 0] = index % 256
    return pixels


def write_parquet(path: Path, count: int = 60, classes: int = 3, **columns: Any) -> Path:
    """A Parquet file of `count` images in row groups of 16, with label i % classes for row i."""
    image = [{"bytes": encode(picture(i)), "path": f"{i}.png"} for i in range(count)]
    table = {"image": image, "label": [i % classes for i in range(count)]} | columns
    pq.write_table(pa.table({name: value for name, value in table.items() if value is not None}), path, row_group_size=16)
    return path


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(picture(index)).save(root / name / f"{index:03}.png")
    return root


def parquet(path: Path, test_path: Path | None = None, **settings: Any) -> ParquetImages:
    test = None if test_path is None else str(test_path)
    return ParquetImages(str(path), test, **{"classes": 3, "size": 8, "batch_size": 16, **settings})


def one_line(act: Callable[[], object], *words: object) -> None:
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.fixture(params=["digits", "parquet", "image_folder"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., InMemoryImages]:
    """Builds a module of each kind; the files are the same at every call."""
    if request.param == "digits":
        return Digits
    if request.param == "parquet":
        path = write_parquet(tmp_path / "train.parquet")
        return lambda **settings: parquet(path, val_share=0.2, test_share=0.2, **settings)
    root = write_folder(tmp_path / "root", {"cat": 30, "dog": 20})
    return lambda **settings: ImageFolder(str(root), classes=2, size=8, val_share=0.2, test_share=0.2, **settings)


# -- what every module gives ------------------------------------------------------------------------------------------


def test_batches_satisfy_the_contract(module: Callable[..., InMemoryImages]) -> None:
    data = module(batch_size=16)
    data.setup("fit")
    channels, classes = data.labelled.images.shape[1], int(data.labelled.labels.max()) + 1
    for loader, part in (
        (data.train_dataloader(), "train"),
        (data.val_dataloader(), "val"),
        (data.test_dataloader(), "test"),
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(labels) for _, labels in batches) == data.sizes[part]
        sizes = {len(labels) for _, labels in batches}
        assert max(sizes) <= 16
        assert max(sizes) - min(sizes) <= 1
        for images, labels in batches:
            check_batch(images, labels, channels, classes)


def test_splits_are_disjoint_complete_and_seeded(module: Callable[..., InMemoryImages]) -> None:
    first, again, other = module(seed=3).labelled, module(seed=3).labelled, module(seed=4).labelled
    together = torch.cat([first.train, first.val, first.test])
    assert together.sort().values.tolist() == list(range(len(first.labels)))
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(first, part), getattr(again, part))
        assert not torch.equal(getattr(first, part), getattr(other, part))


def test_seed_at_the_start_of_an_epoch_reproduces_it(module: Callable[..., InMemoryImages]) -> None:
    def epoch(data: InMemoryImages, seed: int, draw: bool = False) -> Tensor:
        iterator = iter(data.train_dataloader())  # before the seed, as Lightning does in its first epoch
        torch.manual_seed(seed)
        images = []
        for batch, _ in iterator:
            images.append(batch)
            if draw:
                torch.rand(7)  # a model that takes random numbers between two batches
        return torch.cat(images)

    data = module()
    first = epoch(data, 1)
    assert torch.equal(first, epoch(data, 1, draw=True))
    assert torch.equal(first, epoch(module(), 1))
    assert not torch.equal(first, epoch(data, 2))


def test_evaluation_leaves_the_random_generator_alone(module: Callable[..., InMemoryImages]) -> None:
    data = module()
    data.setup()
    before = torch.get_rng_state()
    first = torch.cat([images for images, _ in data.val_dataloader()])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, torch.cat([images for images, _ in data.val_dataloader()]))


def test_normalised_by_the_training_images_only(module: Callable[..., InMemoryImages]) -> None:
    data = module()
    images = data.normalise(data.labelled.images[data.labelled.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    white, mean, std = data.preprocessing["white"], data.preprocessing["mean"], data.preprocessing["std"]
    pixels = data.labelled.images[data.labelled.val].double()
    by_hand = (pixels / white - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    given_images = torch.cat([images for images, _ in data.val_dataloader()])
    assert (given_images - by_hand).abs().max() < 1e-4


def test_digits_sizes_and_strata() -> None:
    data = Digits()
    assert str(data) == "Digits(not read yet)"
    assert data.sizes == {"train": 1079, "val": 359, "test": 359}
    assert "1079" in str(data)
    labels = data.labelled.labels
    for part in (data.labelled.val, data.labelled.test):
        expected = torch.bincount(labels) * len(part) / len(labels)
        assert (torch.bincount(labels[part]) - expected).abs().max() <= 2
    assert (data.labelled.images.max(), data.white) == (16, 16)


def test_digits_epoch_is_cheap_beside_a_network() -> None:
    data = Digits()
    data.setup()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        list(data.train_dataloader())
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.020


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of Lightning, about torch
def test_lightning_trains_validates_and_resumes_the_same(tmp_path: Path) -> None:
    """A run that is stopped after an epoch and resumed sees the batches of a run in one piece."""

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)
            self.seen: list[Tensor] = []
            self.validated = 0

        def on_train_epoch_start(self) -> None:
            torch.manual_seed(100 + self.current_epoch)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            self.seen.append(batch[0].clone())
            return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            self.validated += len(batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Recorder, pl.Trainer]:
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options |= {
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(max_epochs=epochs, **options)
        model = Recorder()
        trainer.fit(model, datamodule=Digits(), ckpt_path=checkpoint, weights_only=True)
        return model, trainer

    torch.manual_seed(0)
    whole, _ = fit(2)
    torch.manual_seed(1)
    first, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    rest, _ = fit(2, tmp_path / "first.ckpt")
    assert whole.validated == 2 * 359
    assert torch.equal(torch.cat(whole.seen), torch.cat(first.seen + rest.seen))


# -- split and augmentation -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=300),
    val=st.floats(0.05, 0.45),
    test=st.floats(0.05, 0.45),
    seed=st.integers(0, 2**32),
)
def test_split_has_exact_sizes_and_keeps_classes_in_proportion(labels: list[int], val: float, test: float, seed: int) -> None:
    array = np.array(labels)
    parts = stratified_split(array, {"val": val, "test": test}, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(array)))
    assert (len(parts["val"]), len(parts["test"])) == (round(val * len(array)), round(test * len(array)))
    for part in parts.values():
        expected = np.bincount(array, minlength=5) * len(part) / len(array)
        assert np.abs(np.bincount(array[part], minlength=5) - expected).max() <= 3


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    shift=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_augmentation_moves_and_mirrors_whole_images(
    n: int, channels: int, height: int, width: int, shift: int, flip: bool, seed: int
) -> None:
    """Every result is one of the images that moving and mirroring by slices gives, and keeps shape and type."""
    images = torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8)
    result = shift_and_flip(images, shift, flip, torch.Generator().manual_seed(seed))
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    for before, after in zip(images, result, strict=True):
        padded = torch.nn.functional.pad(before, (shift,) * 4)
        sources = [padded, torch.nn.functional.pad(before.flip(2), (shift,) * 4)] if flip else [padded]
        assert any(
            torch.equal(after, source[:, y : y + height, x : x + width])
            for source in sources
            for y in range(2 * shift + 1)
            for x in range(2 * shift + 1)
        )


def test_augmentation_differs_within_a_batch_and_can_be_off() -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(64, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    assert len(shift_and_flip(images, 0, True, generator).unique(dim=0)) == 2
    assert len(shift_and_flip(images, 1, False, generator).unique(dim=0)) == 9
    assert torch.equal(shift_and_flip(images, 0, False, generator), images)


def test_augmentation_works_where_the_images_are() -> None:
    """On torch's device without memory, where a tensor of another device is refused as on a GPU."""
    images = torch.zeros(4, 3, 8, 6, dtype=torch.uint8, device="meta")
    moved = shift_and_flip(images, 2, True, torch.Generator().manual_seed(0))
    assert (moved.device, moved.shape, moved.dtype) == (images.device, images.shape, images.dtype)


def test_only_training_images_are_augmented_and_labels_stay_with_them(tmp_path: Path) -> None:
    """The red channel tells the row of an image: it must come with that row's label, at every place of the batch."""
    data = parquet(write_parquet(tmp_path / "a.parquet"), shift=0)
    mean, std = (value[0] * 255 for value in data.mean_and_std)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for images, labels in loader:
            rows = (images[:, 0, 0, 0] * std + mean).round().long()
            assert torch.equal(rows % 3, labels)
    plain = [torch.cat([images for images, _ in parquet(tmp_path / "a.parquet", shift=s).val_dataloader()]) for s in (0, 4)]
    assert torch.equal(*plain)


# -- readers ----------------------------------------------------------------------------------------------------------


def test_parquet_keeps_pixels_and_takes_test_from_its_own_file(tmp_path: Path) -> None:
    train, test = write_parquet(tmp_path / "train.parquet", 40), write_parquet(tmp_path / "test.parquet", 21)
    data = parquet(train, test)
    assert data.sizes == {"train": 36, "val": 4, "test": 21}
    assert data.labelled.test.tolist() == list(range(40, 61))
    expected = [picture(i).transpose(2, 0, 1) for i in [*range(40), *range(21)]]
    assert np.array_equal(data.labelled.images.numpy(), np.stack(expected))


def test_parquet_of_plain_binary_with_other_names_and_label_types(tmp_path: Path) -> None:
    images = pa.array([encode(picture(i)) for i in range(60)], pa.large_binary())
    labels = pa.array([i % 3 for i in range(60)], pa.uint64())
    path = write_parquet(tmp_path / "a.parquet", image=None, label=None, img=images, fine=labels)
    data = parquet(path, image_column="img", label_column="fine")
    assert sum(data.sizes.values()) == 60
    assert data.labelled.labels.dtype == torch.int64


def test_parquet_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    data = parquet(path, path, limit=20)
    assert len(data.labelled.labels) == 40
    assert data.labelled.images[:20, 0, 0, 0].tolist() == list(range(20))


def test_paths_are_relative_to_where_the_program_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    data = parquet(Path("a.parquet"))
    monkeypatch.chdir("/")
    data.setup()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(mode: str, channels: int) -> None:
    level = 200 if mode == "I;16" else 255
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), level * 256 + 7, np.uint16))
    else:
        image = Image.new("RGB", (6, 6), "white").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    pixels = decode_image(buffer.getvalue(), 6, channels)
    assert pixels.shape == (channels, 6, 6)
    assert (pixels == level).all()


def test_a_palette_with_transparency_warns_nobody() -> None:
    image = Image.new("P", (6, 6), 0)
    image.putpalette([90, 90, 90] * 256)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0] * 256))
    assert (decode_image(buffer.getvalue(), 6, 3) == 90).all()


def test_other_sizes_are_scaled_and_cut_to_the_middle() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (decode_image(encode(wide), 4, 3) > 200).all()


def test_image_folder_with_a_folder_for_each_part(tmp_path: Path) -> None:
    counts = {"train/b": 20, "train/a": 10, "val/a": 3, "val/b": 2, "test/b": 4}
    data = ImageFolder(str(write_folder(tmp_path, counts)), classes=2, size=8)
    assert data.class_names == ["a", "b"]
    assert data.sizes == {"train": 30, "val": 5, "test": 4}
    assert data.labelled.labels[data.labelled.test].tolist() == [1, 1, 1, 1]


def test_image_folder_splits_off_the_part_that_has_no_folder(tmp_path: Path) -> None:
    data = ImageFolder(str(write_folder(tmp_path, {"train/a": 20, "train/b": 20, "test/a": 4})), classes=2, size=8)
    assert data.sizes == {"train": 36, "val": 4, "test": 4}


def test_image_folder_with_a_class_called_train(tmp_path: Path) -> None:
    data = ImageFolder(str(write_folder(tmp_path, {"plane": 20, "train": 20})), classes=2, size=8)
    assert data.class_names == ["plane", "train"]


def test_image_folder_passes_over_what_is_no_image(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": 20, "b": 20, ".cache": 1})
    (root / "a" / "notes.txt").write_text("none")
    (root / "a" / ".hidden.png").write_text("none")
    (root / "a" / "more.png").mkdir()
    (root / "list.csv").write_text("none")
    assert sum(ImageFolder(str(root), classes=2, size=8).sizes.values()) == 40


@pytest.mark.parametrize("kind", ["class", "image"])
def test_image_folder_never_follows_a_link_out(tmp_path: Path, kind: str) -> None:
    outside = write_folder(tmp_path / "outside", {"c": 3})
    root = write_folder(tmp_path / "root", {"a": 20, "b": 20})
    link, target = (root / "c", outside / "c") if kind == "class" else (root / "a" / "c.png", outside / "c" / "000.png")
    link.symlink_to(target)
    classes = 3 if kind == "class" else 2
    one_line(ImageFolder(str(root), classes=classes, size=8).setup, link, root)
    link.unlink()
    link.symlink_to(root / "a" if kind == "class" else root / "a" / "000.png")
    ImageFolder(str(root), classes=classes, size=8).setup()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_missing_paths(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    for act in ("setup", "fingerprint"):
        one_line(getattr(parquet(tmp_path / "no.parquet"), act), "data.path", "no.parquet")
        one_line(getattr(parquet(path, tmp_path / "no.parquet"), act), "data.test_path=", "no.parquet")
        one_line(getattr(parquet(tmp_path), act), "folder", "data.path=")
        one_line(getattr(ImageFolder(str(tmp_path / "no"), classes=2), act), "data.path=", "no")
        one_line(getattr(ImageFolder(str(path), classes=2), act), "data.path=", "file")


def test_parquet_without_a_column_lists_those_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=None, picture=[b"x"] * 60)
    one_line(parquet(path).setup, "no column image", "label, picture", "data.module.image_column")
    one_line(parquet(path, image_column="picture", label_column="class").setup, "no column class", "data.module.label_column")


def test_parquet_with_a_broken_column_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 20)
    path.write_bytes(path.read_bytes().replace(b"label", b"lab\xffl"))
    one_line(parquet(path).setup, path)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pq.read_table(write_parquet(tmp_path / "a.parquet"))
    pq.write_table(table.append_column("label", table["label"]), tmp_path / "a.parquet")
    one_line(parquet(tmp_path / "a.parquet").setup, "more than one column label")


@pytest.mark.parametrize("value", [3, -1, None, 2**62])
def test_parquet_label_outside_the_range(tmp_path: Path, value: int | None) -> None:
    labels = [i % 3 for i in range(60)]
    labels[37] = value
    path = write_parquet(tmp_path / "a.parquet", label=pa.array(labels, pa.int64()))
    one_line(parquet(path).setup, "null" if value is None else value, "row 37", "0..2", path)


@pytest.mark.parametrize("column", [{"label": ["cat"] * 60}, {"label": [0.5] * 60}, {"image": [1] * 60}, {"image": ["x"] * 60}])
def test_parquet_columns_of_the_wrong_type(tmp_path: Path, column: dict[str, Any]) -> None:
    one_line(parquet(write_parquet(tmp_path / "a.parquet", **column)).setup, *column)


@pytest.mark.parametrize("data", [b"no image", b"", None, encode(picture(1))[:60], encode(picture(1), "JPEG")[:-60]])
def test_parquet_image_that_cannot_be_decoded(tmp_path: Path, data: bytes | None) -> None:
    images = [{"bytes": encode(picture(i)), "path": None} for i in range(60)]
    images[41] = {"bytes": data, "path": "somewhere.png"}
    images[55] = {"bytes": b"another", "path": None}
    path = write_parquet(tmp_path / "{a}.parquet", image=images)
    one_line(parquet(path).setup, "row 41", path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_parquet_is_one_line_or_reads_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write_parquet(tmp_path_factory.mktemp("damaged") / "a.parquet", 20)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "place")] ^= data.draw(st.integers(1, 255), "bits")
    path.write_bytes(content)
    outcome = None
    try:
        images, labels = next(iter(parquet(path).train_dataloader()))
    except UserError as error:
        outcome = str(error)
    if outcome is None:
        check_batch(images, labels, 3, 3)
    else:
        assert "\n" not in outcome
        assert str(path) in outcome


def test_image_folder_errors(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", {"a": 20, "b": 20, "empty": 0})
    one_line(ImageFolder(str(root), classes=3, size=8).setup, root / "empty", "no image")
    one_line(ImageFolder(str(root), classes=2, size=8).setup, "3 classes", "data.classes=3")
    parts = write_folder(tmp_path / "parts", {"train/a": 20, "train/b": 20, "val/c": 2})
    one_line(ImageFolder(str(parts), classes=2, size=8).setup, parts / "val" / "c")
    (tmp_path / "bare").mkdir()
    one_line(ImageFolder(str(tmp_path / "bare"), classes=2, size=8).setup, tmp_path / "bare", "no class folder")
    (root / "empty").rmdir()
    (root / "a" / "007.png").write_bytes(b"broken")
    one_line(ImageFolder(str(root), classes=2, size=8).setup, root / "a" / "007.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": 20, "b": 20})
    (root / "a").chmod(0)
    one_line(ImageFolder(str(root), classes=2, size=8).setup, root / "a", "Permission")
    (root / "a").chmod(0o700)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"limit": 3}, "val"),
        ({"limit": 0}, "data.limit"),
        ({"val_share": 0}, "data.module.val_share"),
        ({"val_share": 0.6, "test_share": 0.6}, "train"),
        ({"test_share": 1.5}, "data.module.test_share"),
        ({"seed": -1}, "seed=-1"),
        ({"channels": 2}, "data.channels"),
        ({"size": 0}, "data.size"),
        ({"size": 10**6}, "GiB"),
        ({"batch_size": 0}, "data.module.batch_size"),
    ],
)
def test_impossible_settings(tmp_path: Path, wrong: dict[str, Any], word: str) -> None:
    data = parquet(write_parquet(tmp_path / "a.parquet"), **wrong)
    one_line(data.train_dataloader, word)


GOOD = (torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize(
    ("images", "labels", "word"),
    [
        (GOOD[0].numpy(), GOOD[1], "ndarray"),
        (GOOD[0].double(), GOOD[1], "float64"),
        (GOOD[0][0], GOOD[1], "[3, 8, 8]"),
        (GOOD[0][:0], GOOD[1][:0], "[0, 3, 8, 8]"),
        (GOOD[0][:, :1], GOOD[1], "data.channels=1"),
        (GOOD[0], GOOD[1].int(), "int32"),
        (GOOD[0], GOOD[1][:3], "int64 [3]"),
        (GOOD[0], GOOD[1][:, None], "[4, 1]"),
        (GOOD[0].index_fill(0, torch.tensor(2), torch.nan), GOOD[1], "image 2"),
        (GOOD[0].index_fill(0, torch.tensor(3), torch.inf), GOOD[1], "image 3"),
        (GOOD[0], GOOD[1] + 1, "label 2 of a batch is 3"),
        (GOOD[0], GOOD[1] - 1, "label 0 of a batch is -1"),
    ],
)
def test_check_batch_tells_what_is_wrong(images: object, labels: object, word: str) -> None:
    check_batch(*GOOD, 3, 3)
    one_line(lambda: check_batch(images, labels, 3, 3), word)


# -- fingerprints and configuration -----------------------------------------------------------------------------------


def test_fingerprint_changes_with_settings_and_not_with_reading(module: Callable[..., InMemoryImages]) -> None:
    data = module()
    before = fingerprint(data)
    data.setup()
    assert fingerprint(data) == before == fingerprint(module())
    assert before not in (fingerprint(module(seed=1)), fingerprint(module(shift=2)), fingerprint(module(batch_size=7)))


def test_fingerprint_follows_the_content_of_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    before = fingerprint(parquet(path))
    os.utime(path, (0, 0))
    assert fingerprint(parquet(path)) == before
    write_parquet(path, 61)
    assert fingerprint(parquet(path)) != before
    root = write_folder(tmp_path / "root", {"a": 20, "b": 20})
    before = fingerprint(ImageFolder(str(root), classes=2))
    (root / "a" / "000.png").rename(root / "a" / "999.png")
    assert fingerprint(ImageFolder(str(root), classes=2)) != before


class Custom(pl.LightningDataModule):
    """A user's own module, as `data=custom` takes it."""

    def __init__(self, root: Path, classes: int = 3, norm: Callable[..., object] = torch.relu, inner: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*GOOD), batch_size=2)


def test_fingerprint_of_a_module_of_the_user() -> None:
    before = fingerprint(Custom(Path("a")))
    assert fingerprint(Custom(Path("a"))) == before
    assert fingerprint(Custom(Path("a"), inner=object())) == fingerprint(Custom(Path("a"), inner=object()))
    assert before not in (fingerprint(Custom(Path("b"))), fingerprint(Custom(Path("a"), 4)))

    class Speaking(Custom):
        def fingerprint(self) -> str:
            return "v7"

    assert fingerprint(Speaking(Path("a"))) == "v7"


def test_configurations_build_their_modules(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", classes=10)
    root = write_folder(tmp_path / "root", {"a": 20, "b": 20})
    given_values: dict[str, dict[str, Any]] = {
        "digits": {},
        "parquet": {"path": str(path)},
        "image_folder": {"path": str(root), "classes": 2},
        "custom": {
            "module": {"_target_": f"{Digits.__module__}.Digits"},
            "channels": 1,
            "classes": 10,
            "resolutions": [8],
        },
    }
    assert given_values.keys() == {file.stem for file in CONF.glob("*.yaml")}
    for name, values in given_values.items():
        config = OmegaConf.merge({"seed": 5, "data": OmegaConf.load(CONF / f"{name}.yaml")}, {"data": values})
        assert not OmegaConf.missing_keys(config)
        data = hydra.utils.instantiate(config.data.module)
        check_batch(*next(iter(data.train_dataloader())), config.data.channels, config.data.classes)
        assert data.seed == (0 if name == "custom" else 5)
        assert len(config.data.resolutions) >= 1
