"""The default device and space, composed from `conf` as the command lines do, and `key=value` options of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from latency_lut.command import CONFIG_FOLDER, mistake
from latency_lut.device import Device
from spaces.space import Space


def device_and_space(name: str = "x86", threads: int = 1, changes: Sequence[str] = ()) -> tuple[Device, Space]:
    """A device of `conf/device`, and space mobile on the digits' images, with changes such as `space.kernels=[3]`.

    Raises:
        SystemExit: there is no such device, or it does not run here.
    """
    known = sorted(path.stem for path in (CONFIG_FOLDER / "device").glob("*.yaml"))
    if name not in known:
        raise SystemExit(f"error: device {name!r}; allowed are {', '.join(known)}")
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("latency_lut", [f"device=[{name}]", f"devices.{name}.threads={threads}", *changes])
    try:
        return instantiate(config.devices[name]), instantiate(config.space, _convert_="all")
    except InstantiationException as error:
        raise SystemExit(f"error: {mistake(error)}") from error


def take(key: str, arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The text of the last `key=TEXT` among the arguments, and the others."""
    texts = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{key}=")]
    return (texts or [default])[-1], [argument for argument in arguments if not argument.startswith(f"{key}=")]


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
