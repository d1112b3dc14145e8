"""What a device's file says about a transport can be neither an option nor a command."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_lut.transports import Adb, Ssh
from spaces.errors import UserError

HOSTILE = [
    *(
        "",
        " ",
        "-",
        "-oProxyCommand=id",
        "--",
        "-F/tmp/x",
        "pi;id",
        "pi id",
        "pi\nid",
        "pi\n",
        "\npi",
        "pi\0",
        "$(id)",
        "`id`",
        "pi|id",
    ),
    *(
        "pi&id",
        "pi>x",
        "pi<x",
        "pi*",
        "pi?",
        "~pi",
        "pi'",
        'pi"',
        "pi\\",
        "p\u0131",
        "pi\u2028",
        "%h",
        "a@b@c",
        "@pi",
        "-a@pi",
        "a@-pi",
    ),
    *("ssh://pi", "pi:/etc", "[::1]", "pi/", "{a,b}", "#", "!id", "p=i", "p^i", "é", "x" * 256, None, 7, ["pi"], {"pi": 1}),
]
HOSTILE_PATHS = [
    "..",
    "../x",
    "x/..",
    "x/../y",
    "/..",
    "/../x",
    "-x",
    "x/-y",
    "/-x",
    "/",
    "//x",
    "x//y",
    "x/",
    "~/x",
    "$HOME/x",
    "a b",
    "x;y",
]
SAFE = re.compile(r"[A-Za-z0-9_.:@/+-]+", re.ASCII)


@pytest.mark.parametrize(("transport", "place"), [(Ssh, "host"), (Adb, "serial")])
def test_a_hostile_host_is_refused_in_one_line(transport, place):
    for value in HOSTILE:
        with pytest.raises(UserError, match=f"transport: {place} is ") as caught:
            transport(value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["folder", "python"])
@pytest.mark.parametrize("transport", [Ssh, Adb])
def test_a_hostile_path_is_refused_in_one_line(transport, place):
    for value in (*HOSTILE_PATHS, *HOSTILE):
        with pytest.raises(UserError, match=f"transport: {place} is ") as caught:
            transport("pi", **{place: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["pi", "me@pi", "pi.local", "10.0.0.7", "fe80::1", "_u@h-1_x", "PI-2"])
@pytest.mark.parametrize("path", ["netwright", "/tmp/netwright", ".cache/n-w_1.2", "/opt/python3.12+x/bin/python"])
def test_what_hosts_and_paths_are_like_is_allowed(host, path):
    assert (Ssh(host, path, path).host, Ssh(host, path, path).folder) == (host, path)


@given(st.text(max_size=12) | st.text("-o@:/._ab;$ \n", max_size=12))
def test_what_is_allowed_means_nothing_to_a_shell_and_is_no_option(text):
    for make in (Ssh, Adb, lambda value: Ssh("pi", value), lambda value: Adb("pi", python=value)):
        try:
            make(text)
        except UserError:
            continue
        assert SAFE.fullmatch(text)
        assert not text.startswith("-")
        assert ".." not in text.split("/") or make in (Ssh, Adb)
