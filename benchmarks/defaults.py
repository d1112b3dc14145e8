"""The default device and space, composed from `conf` as the command lines do, and `key=value` options of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from latency_lut.command import CONFIG_FOLDER
from latency_lut.device import Device
from spaces.space import Space


def device_and_space() -> tuple[Device, Space]:
    """Device x86 and space mobile on the digits' images."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("latency_lut")
    return instantiate(config.devices.x86), instantiate(config.space, _convert_="all")


def options(arguments: Sequence[str], defaults: Mapping[str, int]) -> dict[str, int]:
    """The defaults with what the command line changes.

    Raises:
        SystemExit: an unknown key, or no integer.
    """
    values = dict(defaults)
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key not in values or not text.isdigit():
            raise SystemExit(f"error: {argument!r}; allowed are {', '.join(f'{k}={v}' for k, v in defaults.items())}")
        values[key] = int(text)
    return values
