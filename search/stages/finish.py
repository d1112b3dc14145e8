"""Stage `finish` (optional): each winner trained a little on its own, before it is exported."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from safetensors.torch import save

from search.job import FINISHED_FOLDER, Job
from search.run import Facts
from search.stages.find import chosen_winners
from search.training.finishing import RememberingTeacher, architecture_key, finish_network, finishing_epochs
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically


def finish_winners(job: Job) -> Facts:
    """Finish the winners of each front; one that did not become better on validation data keeps the supernet's weights."""
    chosen = dict.fromkeys(c.architecture for goal_winners in chosen_winners(job).values() for c in goal_winners)
    supernet_macs = job.run.facts("supernet").get("macs")
    if not supernet_macs:
        raise UserError(
            "the supernet was trained by an earlier version, its cost is unknown; train it again: stages=[supernet]"
        )
    macs = job.finish.share * supernet_macs
    epochs = [finishing_epochs(job.space, a, job.train_images, macs, len(chosen)) for a in chosen]
    teacher = RememberingTeacher(job.evaluator.plain(job.supernet, job.space.largest()))
    networks = []
    for index, (architecture, passes) in enumerate(zip(chosen, epochs, strict=True), 1):
        networks.append(_finish(job, architecture, teacher, passes, f"finishing {index} of {len(chosen)}"))
    teacher_macs = max(epochs, default=0) * job.train_images * job.space.network(job.space.largest()).macs
    better = [n for n in networks if n["kept"] == "finished"]
    gain = sum(n["accuracy_after"] - n["accuracy_before"] for n in better) / max(1, len(networks))
    job.progress.say(
        f"  {len(networks)} winners finished, {len(better)} became better; mean validation accuracy {100 * gain:+.1f} points"
    )
    return {"networks": networks, "teacher_macs": teacher_macs, "files": [n["file"] for n in better]}


def _finish(job: Job, architecture: Architecture, teacher: RememberingTeacher, epochs: int, what: str) -> Facts:
    folder = job.path(FINISHED_FOLDER) / architecture_key(architecture)
    known = _known(folder.with_suffix(".json"), architecture)
    if known is not None:
        return known
    file = folder.with_suffix(".safetensors")
    begin = time.perf_counter()

    def on_epoch(done: int) -> None:
        job.progress.advance(what, done, epochs)

    before = job.evaluator.evaluate(job.supernet, architecture).accuracy
    own = finish_network(
        job.supernet, architecture, teacher, job.evaluator, job.ready_data, epochs, job.finish, job.seed, folder, on_epoch
    )
    after = job.evaluator.evaluate(own, architecture).accuracy
    if after > before:
        write_atomically(file, save({name: value.contiguous() for name, value in own.state_dict().items()}))
    facts = {
        "architecture": dict(architecture),
        "kept": "finished" if after > before else "inherited",
        "file": str(file.relative_to(job.run.path)),
        "epochs": epochs,
        "macs": own.macs_done,
        "seconds": time.perf_counter() - begin,
        "accuracy_before": before,
        "accuracy_after": after,
    }
    write_atomically(folder.with_suffix(".json"), json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)  # the checkpoint
    return facts


def _known(path: Path, architecture: Architecture) -> Facts | None:
    """What an earlier attempt of the stage finished."""
    try:
        facts: Facts = json.loads(path.read_text())
        return facts if facts["architecture"] == dict(architecture) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
