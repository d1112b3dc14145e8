"""Several devices in one call: those of this machine one after the other, others meanwhile, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock

from latency_lut.device import Device

HERE = "this machine"


class Turns:
    """This machine, for one at a time and in about the order in which they ask.

    Measuring here takes a turn, and so does all work on account of other devices that would slow down what is measured here.
    """

    def __init__(self) -> None:
        self._door, self._inside = Lock(), Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it."""
        with self._door:  # whoever waits holds the door, so nobody overtakes by coming back at once
            self._inside.acquire()
        try:
            yield
        finally:
            self._inside.release()


def each(devices: Sequence[Device], do: Callable[[Device, Event], None]) -> dict[str, Exception]:
    """Do something with every device. One that fails does not stop the others.

    Args:
        devices: those of one machine are taken one after the other, in the order given, whatever they are called.
        do: gets a device, and an event that is set when it should stop.

    Returns:
        What was raised, by the name of the device.
    """
    places: dict[str, list[Device]] = {HERE: []}
    for device in devices:
        places.setdefault(HERE if device.transport is None else device.transport.place, []).append(device)
    failures: dict[str, Exception] = {}
    stopped = Event()

    def take(of_place: Sequence[Device]) -> None:
        for device in of_place:
            if stopped.is_set():
                return
            try:
                do(device, stopped)
            except Exception as error:  # whatever it is, it is told in the end
                failures[device.name] = error

    here = places.pop(HERE)
    with ThreadPoolExecutor(max(1, len(places))) as pool:
        try:
            others = [pool.submit(take, of_place) for of_place in places.values()]
            take(here)
            for other in others:
                other.result()
        except BaseException:  # an interruption: the threads end by themselves
            stopped.set()
            raise
    return {device.name: failures[device.name] for device in devices if device.name in failures}
