"""The data of a search: Lightning data modules that give (images float32 [N, C, H, W], labels int64 [N]).

`Digits`, `ParquetImages` and `ImageFolder` keep their images in memory as bytes; any other LightningDataModule serves as
well. The search reads train and validation batches; the test batches are for the exported winners alone. Images keep
their own resolution here: the search resizes them to the one that an architecture asks for.
"""

from __future__ import annotations

from search.data.contract import check_batch, fingerprint
from search.data.digits import Digits
from search.data.image_folder import ImageFolder
from search.data.memory import InMemoryImages
from search.data.parquet import ParquetImages

__all__ = ["Digits", "ImageFolder", "InMemoryImages", "ParquetImages", "check_batch", "fingerprint"]
