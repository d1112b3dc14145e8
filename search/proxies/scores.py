"""Scores of architectures by zero-cost proxies, each computed once: one Parquet file, known by the network's fingerprint."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from search.evaluation import Weights
from search.one_by_one import FreshNetworks
from search.proxies.proxy import PROXIES, check_names, score
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.space import Space
from spaces.supernet import Supernet

SAVE_EVERY = 64


@dataclass(frozen=True)
class ProxySettings:
    """Which proxies are features of the accuracy predictor, and how many images they see.

    Raises:
        UserError: an unknown proxy, or fewer than two images.
    """

    features: Sequence[str] = ()
    images: int = 32

    def __post_init__(self) -> None:
        check_names("proxies.features", self.features)
        if type(self.images) is not int or self.images < 2:
            raise UserError(f"proxies.images is {self.images!r}; allowed are integers from 2")


class ProxyScores:
    """Scores networks as they are before training: taken out of a fresh supernet of the seed.

    Args:
        path: of the file; read if it is there.
        space: of the architectures.
        images: `(n, channels, height, width)`.
        labels: `(n,)`.
        seed: of the initial weights and of what proxies draw.
        key: fingerprint of space, images and seed; a file with another key counts as empty.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, space: Space, images: torch.Tensor, labels: torch.Tensor, seed: int, key: str) -> None:
        self.path, self.space, self.images, self.labels, self.seed, self.key = path, space, images, labels, seed, key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._networks: Weights = Supernet(space) if space.shares_weights else FreshNetworks(space, seed)
        self._known: dict[str, dict[str, float]] = {}
        self._unsaved = 0
        if path.exists():
            try:
                self._load()
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(f"{path} is damaged ({reason}); delete it and run again") from error

    def scores(
        self,
        names: Sequence[str],
        architectures: Sequence[Architecture],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """Scores `(n, len(names))`, the larger the better; what is not known yet is computed, and kept.

        Raises:
            UserError: a score is not finite.
        """
        fingerprints = [self.space.network(a).fingerprint for a in architectures]
        wanted = {f: a for f, a in zip(fingerprints, architectures, strict=True) if names and not self._knows(f, names)}
        for done, (fingerprint, architecture) in enumerate(wanted.items(), 1):
            known = self._known.setdefault(fingerprint, {})
            network = self._networks.extract(architecture)
            known |= {n: score(n, network, self.images, self.labels, self.seed) for n in names if n not in known}
            self._unsaved += 1
            if self._unsaved >= SAVE_EVERY:
                self.save()
            on_progress(done, len(wanted))
        rows = [[self._known[f][name] for name in names] if names else [] for f in fingerprints]
        return np.array(rows, dtype=float).reshape(len(architectures), len(names))

    def _knows(self, fingerprint: str, names: Sequence[str]) -> bool:
        return self._known.get(fingerprint, {}).keys() >= set(names)

    def _load(self) -> None:
        table = pq.read_table(self.path)
        if (table.schema.metadata or {}).get(b"key") != self.key.encode():
            return
        names = [name for name in table.column_names if name in PROXIES]
        for row in table.to_pylist():
            found = {name: float(row[name]) for name in names if row[name] is not None}
            if not all(map(math.isfinite, found.values())):
                raise ValueError(f"scores {found}")
            self._known[str(row["network"])] = found

    def save(self) -> None:
        """Write the file, whole or not at all; nothing is done where nothing is new."""
        if not self._unsaved:
            return
        fields = [("network", pa.string()), *((name, pa.float64()) for name in PROXIES)]
        rows = [{"network": fingerprint, **found} for fingerprint, found in self._known.items()]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata={"key": self.key})), buffer)
        write_atomically(self.path, buffer.getvalue())
        self._unsaved = 0


def compressed(scores: np.ndarray) -> np.ndarray:
    """Scores on a scale on which those of small and large networks are comparable: logarithmic on both sides of 0."""
    return np.asarray(np.sign(scores) * np.log1p(np.abs(scores)))
