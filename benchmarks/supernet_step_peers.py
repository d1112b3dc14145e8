"""A sandwich step of this library's supernet and of another tool's: `python -m benchmarks.supernet_step_peers peer=NAME`.

Both share weights among the same networks: those of the default space in float and dense, with the largest head, which every
tool can make elastic (`benchmarks.elastic_peers`). What is timed and divided is that of `benchmarks.supernet_step`, for both:
four networks (largest, smallest, two drawn ones) forward and backward in the shared weights and one AdamW step, over the sum of
a step of each network alone as a plain module. The peer's networks alone are those that the peer itself extracts. In every
repeat all sides train the same four architectures on the same batch.

`peer=modelopt` or `peer=nni`; changes of the space are taken too, such as `space.kernels=[3]`. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
import torch

from benchmarks.defaults import device_and_space, options, take
from benchmarks.elastic_peers import peer_of
from benchmarks.supernet_step import (
    CLASSES,
    IMAGE_SIDE,
    Alone,
    NetworkAlone,
    Sandwich,
    Steps,
    alone_with_weights,
    interleaved,
    largest_difference,
)
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet

# What every tool can make elastic: modelopt does not trace the width of the head through the pooling to the classifier.
COMMON = ("space.precisions=[fp32]", "space.sparsities=[dense]", "space.head=[192]")


def main() -> None:
    name, rest = take("peer", sys.argv[1:], "modelopt")
    changes = [argument for argument in rest if argument.startswith("space.")]
    own = [argument for argument in rest if argument not in changes]
    values = options(own, {"repeats": 40, "batch": 32, "threads": 1, "seed": 0})
    torch.set_num_threads(values["threads"])
    torch.manual_seed(values["seed"])
    _, space = device_and_space(changes=(*COMMON, *changes))
    if not isinstance(space, MobileSpace):
        raise SystemExit(f"error: space {space.name}; allowed is mobile")
    images, labels = (
        torch.randn(values["batch"], space.channels, IMAGE_SIDE, IMAGE_SIDE),
        torch.randint(CLASSES, (values["batch"],)),
    )
    supernet, peer = Supernet(space), peer_of(name, space)
    ours, theirs = Sandwich(space, supernet), Sandwich(space, peer)
    first = [*ours.ends, *ours.drawn(values["seed"])]
    differences = {
        "max_abs_diff": largest_difference(supernet, partial(alone_with_weights, supernet), first, images),
        "peer_max_abs_diff": largest_difference(peer, peer.extract, first, images),
    }

    def sides_of(repeat: int) -> Steps:
        seed = values["seed"] * 100_003 + repeat
        architectures = [*ours.ends, *ours.drawn(seed)]
        networks = [space.network(architecture) for architecture in architectures]
        return {
            "sandwich": [partial(ours.step, images, labels, seed)],
            "standalone": [partial(Alone(NetworkAlone(network)).step, images, labels) for network in networks],
            "peer_sandwich": [partial(theirs.step, images, labels, seed)],
            "peer_standalone": [partial(Alone(peer.extract(a)).step, images, labels) for a in architectures],
        }

    times = {side: np.array(times_ms) for side, times_ms in interleaved(sides_of, values["repeats"]).items()}
    ratios = {
        "step_ratio": times["sandwich"] / times["standalone"],
        "peer_step_ratio": times["peer_sandwich"] / times["peer_standalone"],
        "peer_sandwich_over_ours": times["peer_sandwich"] / times["sandwich"],
    }
    result: dict[str, object] = {"peer": name}
    for key, found in ratios.items():
        result[key] = round(float(np.median(found)), 4)
        result[f"{key}_quartiles"] = [round(float(q), 4) for q in np.quantile(found, [0.25, 0.75])]
    result |= {f"{side}_ms": round(float(np.median(values_ms)), 3) for side, values_ms in times.items()}
    result |= {**differences, "repeats": values["repeats"], "threads": torch.get_num_threads(), "batch": values["batch"]}
    print(json.dumps({**result, "space": [*COMMON, *changes]}))


if __name__ == "__main__":
    main()
