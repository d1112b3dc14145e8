"""A stand-in of adb that writes down what it is asked, and does it on this machine, where the device is called `phone-1`."""

import json
import os
import sys

# As the real one: `shell` hands its arguments, joined, to the device's shell and has its status; complaints have status 1.
STAND_IN = """#!{python}
import json, os, shutil, subprocess, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
flag, serial, verb, *rest = sys.argv[1:]
if flag != "-s" or serial != "phone-1":
    sys.exit(f"adb: device '{{serial}}' not found")
if verb == "shell":
    sys.exit(subprocess.run(["sh", "-c", " ".join(rest)]).returncode)
if verb == "push":
    shutil.copyfile(*rest)
    print(rest[0] + ": 1 file pushed, 0 skipped.")
    sys.exit(0)
sys.exit(f"adb: unknown command {{verb}}")
"""


def install(folder, monkeypatch):
    """Put it in front on the PATH; a function that lists the arguments of all calls so far."""
    program = folder / "bin" / "adb"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, log=str(folder / "adb_log")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in (folder / "adb_log").read_text().splitlines()]
