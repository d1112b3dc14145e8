"""What of a configuration belongs to a run: the settings that its results follow from, and the overrides that began it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
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


def fallen_overrides(saved: Sequence[str], given: Sequence[str]) -> dict[str, list[str]]:
    """Saved overrides that no longer apply, by the override given now that switches their group to another option.

    These are all below the group, and those of keys that only the option before had. The options that an option chooses in
    other groups count as switched by it.

    Args:
        saved: overrides with which the run was begun.
        given: overrides of this call.
    """
    groups = set(GlobalHydra.instance().config_loader().list_groups(""))
    switches = [text for text in given if override_key(text) in groups]
    values = [text for text in saved if override_key(text) not in groups]
    if not switches or not values:
        return {}
    chosen = [text for text in saved if override_key(text) in groups]
    fallen: dict[str, list[str]] = {}
    before, options_before = _composed(chosen)
    for text in switches:
        chosen = merged_overrides(chosen, [text])
        after, options = _composed(chosen)
        switched = {group for group in {*options, *options_before} if options.get(group) != options_before.get(group)}
        gone = [v for v in values if _below(override_key(v), switched) or _only_in(override_key(v), before, after)]
        if gone:
            fallen[text] = gone
        values = [v for v in values if v not in gone]
        before, options_before = after, options
    return fallen


def _composed(chosen: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration that options of groups make, as it is before it is resolved, and all these options by group."""
    config = compose("search", list(chosen), return_hydra_config=True)
    options = dict(config.hydra.runtime.choices)
    values: Any = OmegaConf.to_container(config, resolve=False)
    return values, options


def _below(key: str, groups: Collection[str]) -> bool:
    return key.partition(".")[0] in groups


def _only_in(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a key, or something that it is part of, is in one configuration and not in the other."""
    ours: Any = before
    theirs: Any = after
    for part in key.split("."):
        if not isinstance(ours, dict) or part not in ours:
            return False
        if not isinstance(theirs, dict) or part not in theirs:
            return True
        ours, theirs = ours[part], theirs[part]
    return False


def kept_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides that belong to the run, not to this call."""
    kept = (text for text in overrides if override_key(text) != STORAGE)
    return [text for text in kept if override_key(text).partition(".")[0] not in NOT_OF_THE_RUN]


def own_processes(overrides: Sequence[str]) -> list[str]:
    """Overrides of the processes of this call, which are not the run's."""
    return [text for text in overrides if override_key(text).partition(".")[0] in ("threads", "trainer")]
