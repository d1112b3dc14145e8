"""What every operator is worth after training: `python -m benchmarks.operators [key=value ...]`; JSON on the last line.

One network of the space `mobile` (two stages, 32 and 48 channels) is trained alone on the digits, once for each precision,
sparsity, rank, mask training and gradient estimator, with the same seed, steps and learning rate, the operator in every layer
that can have it. Then it is recalibrated, folded, exported and run in onnxruntime. `drop` is the float network's validation
accuracy less the operator's, in torch, mean over the seeds; `allowed` is what a sound estimator stays within here: more is a
broken one. `runtime_drop` is the same for the exported model, `agreement` the share of images of one class in both.

A broken estimator is what this shows; it does not rank methods: one network, one small data set.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.defaults import options
from latency_lut.device import Device
from latency_lut.lowering import applicable
from search.data import Digits
from search.evaluation import Evaluator, calibration_batches, collect
from search.export import Tolerances, export, verify
from spaces.mask_strategies import create_mask_training
from spaces.mask_training import MASK_TRAININGS
from spaces.mobile import MobileSpace
from spaces.quantizers import QuantizerSettings
from spaces.quantizers.weights import BINARY_ESTIMATORS, SCALE_RULES
from spaces.supernet import Supernet
from spaces.weights import Estimators

BATCH = 64
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.01
STAGES = ({"widths": [32], "depths": [1], "stride": 1}, {"widths": [48], "depths": [2], "stride": 2})


@dataclass(frozen=True)
class Case:
    """One operator: what differs from the dense float network, and the drop that a sound one stays within."""

    name: str
    allowed: float
    precision: str = "fp32"
    sparsity: str = "dense"
    rank: str = "full"
    activation: str = "relu"
    hidden: str = "plain"
    masks: str = "masked"
    saliency: str = "magnitude"
    settings: QuantizerSettings = field(default_factory=QuantizerSettings)


def cases() -> Iterator[Case]:
    yield Case("fp32", 0.0)
    precisions = {
        0.02: ("w8a8", "w7a8", "w8d8", "w7d8", "w8"),
        0.04: ("w4a8", "w4", "w4@32", "w4@tensor", "w4@inputs", "power4", "codebook4", "w3"),
        0.08: ("w2", "w2@32", "w2a8", "ternary", "ternary_a8", "codebook2"),
        0.15: ("binary", "binary_a8", "partial@1/8"),
    }
    for allowed, names in precisions.items():
        for name in names:
            yield Case(name, allowed, precision=name)
    for rule in SCALE_RULES:
        yield Case(f"w3a8, scale {rule}", 0.06, precision="w3a8", settings=QuantizerSettings(scale=rule))
    yield Case("w3a8, annealing", 0.06, precision="w3a8", settings=QuantizerSettings(annealing=True))
    for estimator in BINARY_ESTIMATORS[1:]:
        yield Case(f"binary, {estimator}", 0.15, precision="binary", settings=QuantizerSettings(binary=estimator))
    for sparsity in ("group@1/2", "2:4", "4:8", "block4x1@1/2", "block1x4@1/2", "block4x4@1/2", "block16x1@1/2"):
        yield Case(sparsity, 0.04, sparsity=sparsity)
    for sparsity in ("group@1/4", "1:4", "unstructured@1/4"):
        yield Case(sparsity, 0.06, sparsity=sparsity)
    for saliency in ("taylor", "random"):
        yield Case(f"unstructured@1/4, {saliency}", 0.1, sparsity="unstructured@1/4", saliency=saliency)
    for masks in MASK_TRAININGS:
        yield Case(f"1:4, {masks}", 0.06, sparsity="1:4", masks=masks)
    for rank in ("1/2", "1/4"):
        yield Case(f"rank {rank}", 0.05, rank=rank)
    yield Case("rank 1/2 w8a8", 0.06, rank="1/2", precision="w8a8")
    yield Case("hard_swish", 0.03, activation="hard_swish")
    for sparsity in ("unstructured@1/4", "2:4", "group@1/2"):
        yield Case(f"{sparsity}, selective", 0.06, sparsity=sparsity, activation="selective")
    for sparsity in ("1:4", "group@1/4"):
        yield Case(f"{sparsity}, iso-FLOP", 0.04, sparsity=sparsity, hidden="iso_flop")
    yield Case("group@1/2 w4@32 (GQSA)", 0.06, precision="w4@32", sparsity="group@1/2")
    yield Case("2:4 w8a8", 0.05, precision="w8a8", sparsity="2:4")


def space_of(case: Case) -> MobileSpace:
    kinds = ([case.precision], [case.sparsity], [case.rank], [case.activation])
    return MobileSpace(1, 10, [8], [16], STAGES, [2], [3], [64], *kinds, hidden=[case.hidden])


def train(case: Case, data: Digits, epochs: int, seed: int) -> Supernet:
    torch.manual_seed(seed)
    estimators = Estimators(create_mask_training(case.masks), case.settings, case.saliency)
    supernet = Supernet(space_of(case), estimators)
    optimizer = torch.optim.AdamW(supernet.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = len(data.train_dataloader())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    for epoch in range(epochs):
        for number, (images, labels) in enumerate(data.train_dataloader()):
            supernet.start_step(epoch * batches + number, epochs * batches)
            optimizer.zero_grad()
            F.cross_entropy(supernet(images), labels).backward()  # type: ignore[no-untyped-call]
            supernet.before_step()
            optimizer.step()
            supernet.after_step()
            schedule.step()
    supernet.start_step(1, 1)
    return supernet


def measure(case: Case, data: Digits, evaluator: Evaluator, epochs: int, seed: int) -> dict[str, Any]:
    device = Device("x86")
    supernet = train(case, data, epochs, seed)
    plain = evaluator.plain(supernet, supernet.space.largest())
    lowerings = [applicable(spec)[-1] for spec in plain.network.layers]
    model = export(plain, lowerings, device, {})
    check = verify(plain, lowerings, model, device, evaluator.split, Tolerances())
    return {
        "torch": check.accuracy_torch,
        "runtime": check.accuracy_runtime,
        "agreement": check.agreement,
        "bytes": len(model),
        "failures": check.failures,
    }


def main() -> None:
    values = options(sys.argv[1:], {"epochs": 15, "seeds": 2, "threads": 1, "cases": 1000})
    torch.set_num_threads(values["threads"])
    data = Digits(batch_size=BATCH, seed=0)
    data.setup()
    evaluator = Evaluator(calibration_batches(data, 256, 0), collect(data, "validation"))
    rows, begin, reference = [], time.perf_counter(), {"torch": 0.0, "runtime": 0.0}
    for case in list(cases())[: values["cases"]]:
        found = [measure(case, data, evaluator, values["epochs"], seed) for seed in range(values["seeds"])]
        means = {key: float(np.mean([f[key] for f in found])) for key in ("torch", "runtime", "agreement")}
        reference = means if case.name == "fp32" else reference
        row = {
            "case": case.name,
            "accuracy": round(means["torch"], 4),
            "drop": round(reference["torch"] - means["torch"], 4),
            "allowed": case.allowed,
            "runtime_drop": round(reference["runtime"] - means["runtime"], 4),
            "agreement": round(means["agreement"], 4),
            "bytes": found[0]["bytes"],
            "verified": not any(f["failures"] for f in found),
        }
        rows.append(row)
        mark = "" if row["drop"] <= case.allowed and row["verified"] else "  <-"
        told = f"drop {row['drop']:+.3f} of {case.allowed:.2f}  agreement {row['agreement']:.4f}  {row['bytes']:7,} B"
        print(f"{case.name:32} {means['torch']:7.1%} {told}{mark}", flush=True)
    result = {
        "operators": len(rows),
        "beyond_allowed": [r["case"] for r in rows if r["drop"] > r["allowed"]],
        "not_verified": [r["case"] for r in rows if not r["verified"]],
        "float_accuracy": round(reference["torch"], 4),
        "seconds": round(time.perf_counter() - begin, 1),
        "epochs": values["epochs"],
        "seeds": values["seeds"],
        "rows": rows,
        "device": Device("x86").describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
