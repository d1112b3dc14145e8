"""Energy meters on a copy of powercap's folder and on a stand-in of NVIDIA's library; without a meter there is no energy."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from latency_lut import energy
from latency_lut.device import Device
from latency_lut.energy import NvmlMeter, RaplMeter, measure_energy, meter_of, run_energy_uj
from latency_lut.lowering import applicable
from latency_lut.networks import NetworkValue, empty_table
from predictors.energy import EnergyPredictor, times_us
from predictors.latency import LatencyPredictor
from spaces.errors import UserError

RANGE_UJ = 262_143_328_850


def zone(root, name, label, uj=0, range_uj=RANGE_UJ):
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", str(uj)), ("max_energy_range_uj", str(range_uj))):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Powercap's folder as on a machine with two packages, with zones that must not be counted beside them."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    counters = [zone(tmp_path, f"intel-rapl:{i}", f"package-{i}") for i in range(2)]
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7)
    (tmp_path / "intel-rapl").mkdir()
    return counters


@pytest.fixture
def burning(powercap, monkeypatch):
    """The first package's counter goes up with time, past its range: 10 W, counted when read, as Linux does."""
    begin = energy.time.perf_counter()

    def read(path):
        if path == powercap[0]:
            return str(int(RANGE_UJ - 2_000_000 + 10e6 * (energy.time.perf_counter() - begin)) % RANGE_UJ)
        return original(path)

    original = energy._text
    monkeypatch.setattr(energy, "_text", read)
    return 10.0


def test_packages_are_added_up_and_nothing_is_counted_twice(powercap):
    meter = RaplMeter()
    powercap[0].write_text("1000")
    powercap[1].write_text("500")
    assert meter.used_uj() == 1500
    powercap[1].write_text("700")
    assert meter.used_uj() == 1700
    meter.start()
    assert meter.used_uj() == 0


def test_a_counter_that_wraps_around_goes_on(powercap):
    powercap[0].write_text(str(RANGE_UJ - 100))
    meter = RaplMeter()
    powercap[0].write_text("50")
    assert meter.used_uj() == 150
    powercap[0].write_text("70")
    assert meter.used_uj() == 170


@pytest.mark.parametrize("text", ["", "-5", "1.5", "many", "9" * 30, "\xb2"])
def test_a_counter_that_is_no_number_is_told(powercap, text):
    powercap[0].write_text(text)
    with pytest.raises(UserError, match="energy_uj says"):
        RaplMeter()


def test_a_counter_that_may_not_be_read_is_told(powercap, monkeypatch):
    path = powercap[0]

    def refuse(self, *arguments, **named):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **named)

    original = type(path).read_text
    monkeypatch.setattr(type(path), "read_text", refuse)
    with pytest.raises(UserError, match=f"may not be read; run: sudo chmod a\\+r {path}"):
        RaplMeter()


def test_without_packages_the_meter_is_refused(tmp_path):
    zone(tmp_path, "intel-rapl:0", "psys")
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no package in .*; take a machine with RAPL"):
            RaplMeter(root)


def test_without_a_meter_there_is_no_energy(x86, powercap):
    with pytest.raises(UserError, match=r"has no energy meter, so there is no energy to search for; .*energy_meter=rapl"):
        meter_of(x86)
    with pytest.raises(UserError, match="energy_meter is 'watts'; allowed are rapl, nvml, null"):
        Device("x86", energy_meter="watts")
    assert isinstance(meter_of(Device("x86", energy_meter="rapl")), RaplMeter)
    assert Device("x86", energy_meter="rapl").fingerprint == x86.fingerprint  # its tables stay valid


class Model:
    """A model of a known speed, and a clock that only its runs move."""

    now_s = 0.0

    def visit(self, seconds):
        self.now_s += seconds + 0.001
        return 250.0

    def perf_counter(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    """A model whose runs are all that takes time."""
    model = Model()
    monkeypatch.setattr(energy, "time", model)
    return model


def test_energy_is_power_times_the_time_of_a_run(clock, burning):
    assert run_energy_uj(clock, RaplMeter(), 0.4) == pytest.approx(burning * 250.0, rel=0.001)


def test_a_meter_that_stands_still_is_not_believed(powercap):
    with pytest.raises(UserError, match="stood still"):
        run_energy_uj(Model(), RaplMeter(), 0.02)


def test_networks_are_measured_and_predicted(burning, tiny_space, tiny_table, tmp_path):
    """At a constant power energy is latency times power, which the model has to find."""
    device = Device("x86", energy_meter="rapl")
    table = measure_energy(tiny_space, device, tmp_path / "x86.energy.json", networks=36, window_s=0.06)
    assert (table.quantity, table.unit, len(table.networks)) == ("energy", "uJ", 36)
    assert "meter rapl" in table.statistic
    latency = LatencyPredictor.fit(tiny_table, tiny_space, held_out=4)
    fitted = EnergyPredictor.fit(table, tiny_space, latency, held_out=12)
    assert all(0 <= power < 100 for power in fitted.power_w.values())
    assert fitted.quality.n == 12
    network = tiny_space.network(tiny_space.largest())
    lowerings = [applicable(spec)[0] for spec in network.layers]
    mean, std = fitted.predict(network, lowerings)
    low, high = fitted.interval(network, lowerings)
    assert low <= mean <= high
    assert std >= 0
    # The table was measured earlier: where the machine is busier now, a run takes longer, and then more energy.
    modelled = [latency.predict(tiny_space.network(n.architecture), n.lowerings)[0] for n in table.networks]
    power = np.median([n.value / us for n, us in zip(table.networks, modelled, strict=True)])
    assert 0.5 * burning < power < 5 * burning
    assert mean == pytest.approx(power * latency.predict(network, lowerings)[0], rel=0.6)
    table.networks = table.networks[:10]
    with pytest.raises(UserError, match="10 networks with measured energy; a model needs 30"):
        EnergyPredictor.fit(table, tiny_space, latency)


def stand_in(readings, error=None):
    """What of pynvml is used."""

    class NVMLError(Exception):
        pass

    def init():
        if error:
            raise NVMLError(error)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )


def test_nvml_counts_millijoules(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(iter([5_000, 6_000, 6_250])))
    meter = NvmlMeter()
    meter.start()
    assert meter.used_uj() == 250_000


def test_nvml_without_a_gpu_or_its_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(iter([]), "Driver Not Loaded"))
    with pytest.raises(UserError, match="energy meter nvml: Driver Not Loaded; take a machine with an NVIDIA GPU"):
        NvmlMeter()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match="pip install nvidia-ml-py"):
        NvmlMeter()


def test_powers_of_kinds_are_told_apart(tiny_space, tiny_table, x86):
    """Integer layers that take four times the power of float ones."""
    latency = LatencyPredictor.fit(tiny_table, tiny_space, held_out=4)
    table, rng = empty_table("energy", "uJ", "made up", tiny_space, x86), np.random.default_rng(0)
    for _ in range(90):
        architecture = tiny_space.sample(rng)
        network = tiny_space.network(architecture)
        lowerings = tuple(str(rng.choice(applicable(spec))) for spec in network.layers)
        times = times_us(network, lowerings, latency)
        value = sum(us * (20.0 if "integer" in kind else 5.0) for kind, us in times.items())
        table.networks.append(NetworkValue(architecture, lowerings, value))
    fitted = EnergyPredictor.fit(table, tiny_space, latency, held_out=20)
    assert fitted.quality.mape < 0.05
    assert fitted.power_w["pointwise integer"] > 2 * fitted.power_w["pointwise float"]
