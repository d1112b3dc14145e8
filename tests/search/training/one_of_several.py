"""One process of a training on several: FOLDER BATCH_SIZE EPOCHS [STOP]; `test_parallel.py` sets RANK and WORLD_SIZE."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from search.data import Digits
from search.evaluation import Evaluator, calibration_batches, collect
from search.training import SupernetTraining, train
from search.training.parallel import Processes
from search.training.sandwich import Sandwich
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet


def main(folder: Path, batch_size: int, epochs: int, stop: int) -> None:
    torch.set_num_threads(1)
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stages = [{"widths": [8, 16], "depths": [1, 2], "stride": 2}]
    space = MobileSpace(1, 10, [8], [8], stages, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense", "group@1/2"])  # type: ignore[arg-type]
    data = Digits(batch_size=batch_size, seed=0)
    data.setup()
    evaluator = Evaluator(calibration_batches(data, 64, 0), collect(data, "validation"))
    torch.manual_seed(rank)  # other initial weights than the first process has, which are the ones that count
    supernet = Supernet(space)

    def on_epoch(done: int, curve: object) -> None:
        if done == stop + 1:
            os._exit(9)  # stands for a kill, after the checkpoint of the epoch before

    training = SupernetTraining(supernet, Sandwich(1), epochs, 0.01, 0.0, 0, evaluator, curve_points=0, on_epoch=on_epoch)
    train(training, data, folder / "checkpoints", Processes(devices=count))
    save_file({name: value.contiguous() for name, value in supernet.state_dict().items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps({"curve": training.curve, "macs": training.macs_done}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else -1)
