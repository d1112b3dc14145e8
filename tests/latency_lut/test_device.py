"""Devices: what they say about themselves, and which ones are refused."""

import json
from dataclasses import replace

import onnxruntime
import pytest

from latency_lut.device import Device, runtimes
from latency_lut.ort_session import describe_kernels
from spaces.errors import UserError


def test_describe_says_what_a_number_needs():
    said = Device("x86").describe()
    assert said["cpu"]
    assert said["cores"] >= 1
    assert said["runtime_version"] == onnxruntime.__version__
    assert (said["provider"], said["threads"], said["batch"]) == ("CPUExecutionProvider", 1, 1)
    assert json.loads(json.dumps(said)) == said


def test_fingerprint_depends_on_settings_and_not_on_the_name():
    device = Device("x86")
    assert device.fingerprint == Device("x86").fingerprint == Device("renamed").fingerprint
    assert replace(device, batch=2).fingerprint != device.fingerprint


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runtime": "tvm"}, "'tvm'; allowed are onnxruntime"),
        ({"provider": "NoProvider"}, "CPUExecutionProvider"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "this machine has"),
        ({"threads": "2"}, "threads is '2'"),
        ({"threads": True}, "threads is True"),
        ({"batch": 0}, "batch is 0"),
        ({"name": "../x86"}, "'../x86'"),
        ({"name": ""}, "device name"),
    ],
)
def test_wrong_settings_are_told_in_one_line(settings, said):
    with pytest.raises(UserError) as caught:
        Device(**({"name": "x86"} | settings))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_onnxruntime_is_a_runtime():
    assert "onnxruntime" in runtimes()


def test_a_gpu_that_is_not_there_is_told_with_what_to_install() -> None:
    if "CUDAExecutionProvider" in Device("x86").load_runtime().providers():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"'CUDAExecutionProvider'; available here are .*CPU.*pip install onnxruntime-gpu"):
        Device("gpu", provider="CUDAExecutionProvider")


def test_kernels_that_are_not_the_default_ones_are_told():
    """Without VNNI integers run on other kernels, whose latencies must not be mixed with those of the default ones."""
    provider = "CPUExecutionProvider"
    assert describe_kernels("sse4_2 avx2", provider) == {"integer_kernels": "precise"}
    for sets in ("sse4_2 avx2 avx512_vnni", "sse4_2 avx2 avx_vnni", "asimd asimddp", ""):
        assert describe_kernels(sets, provider) == {}
    assert describe_kernels("sse4_2 avx2", "CUDAExecutionProvider") == {}
