"""A worker of a shared study, started by tests: `study_worker.py URL KEY FOLDER SECONDS [COUNT]`.

It evaluates what it finds until it is killed; with a count it leads: it asks for so many networks and prints what came of them.
Each network that it evaluates leaves a line in `FOLDER/PID`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from search import shared_study
from search.evaluation import Evaluation
from spaces.choice import Architecture

shared_study.HEARTBEAT_S, shared_study.GRACE_S, shared_study.POLL_S = 1, 4, 0.05


def main(url: str, key: str, folder: str, seconds: str, count: str = "0") -> None:
    def measure(architecture: Architecture) -> Evaluation:
        time.sleep(float(seconds))
        with (Path(folder) / str(os.getpid())).open("a") as file:
            file.write(f"{architecture['number']}\n")
        return Evaluation(int(architecture["number"]) / 1000, 0.5)

    study = shared_study.SharedStudy(url, key, measure, lambda line: print(line, file=sys.stderr, flush=True))
    print("ready", flush=True)
    if int(count):
        asked = [Architecture({"number": number}) for number in range(int(count))]
        print(json.dumps([[a["number"], e.accuracy, e.loss] for a, e in study.evaluate(asked)]), flush=True)
        return
    while True:
        if not study.serve_some():
            time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
