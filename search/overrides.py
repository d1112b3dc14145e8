"""What of a configuration belongs to a run: the settings that its results follow from, and the overrides that began it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spaces.errors import UserError

OVERRIDES_FILE = "overrides.json"
NOT_OF_THE_RUN = ("run", "sweep", "stages", "threads", "trainer", "share", "evaluator")
STORAGE = "study.storage"


def plain_settings(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, without what does not change a result."""
    values = OmegaConf.to_container(config, resolve=True)
    if not isinstance(values, dict):
        raise TypeError("the configuration is not a mapping")
    values.get("study", {}).pop("storage", None)
    return {str(key): value for key, value in values.items() if key not in NOT_OF_THE_RUN}


def missing_keys(values: Any, prefix: str = "") -> list[str]:
    """Names of values that the configuration leaves to the user (`???`)."""
    if values == "???":
        return [prefix]
    if isinstance(values, dict):
        return [key for name, value in values.items() for key in missing_keys(value, f"{prefix}.{name}".lstrip("."))]
    return []


def saved_overrides(path: Path) -> list[str]:
    """The overrides with which a run was begun.

    Raises:
        UserError: the file is damaged.
    """
    try:
        overrides = json.loads((path / OVERRIDES_FILE).read_text())
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise ValueError("not a list of strings")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / OVERRIDES_FILE} is damaged ({error}); use another run folder: run=FOLDER") from error
    return overrides


def override_key(text: str) -> str:
    """What an override sets: `study.rounds` of `+study.rounds=3`."""
    return text.lstrip("+~").partition("=")[0]


def merged_overrides(saved: Sequence[str], given: Sequence[str]) -> list[str]:
    """Saved overrides with those given now in place of their namesakes."""
    replaced = {override_key(text) for text in given}
    return [text for text in saved if override_key(text) not in replaced] + list(given)


def kept_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides that belong to the run, not to this call."""
    kept = (text for text in overrides if override_key(text) != STORAGE)
    return [text for text in kept if override_key(text).partition(".")[0] not in NOT_OF_THE_RUN]


def own_processes(overrides: Sequence[str]) -> list[str]:
    """Overrides of the processes of this call, which are not the run's."""
    return [text for text in overrides if override_key(text).partition(".")[0] in ("threads", "trainer")]
