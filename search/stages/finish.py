"""Stage `finish` (optional): each winner trained a little on its own, before it is exported."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from search.job import FINISHED_FOLDER, Job
from search.run import Facts
from search.stages.find import chosen_winners
from search.training.finishing import Finished, Finisher, architecture_key, finishing_epochs
from search.training.parts import Trainings
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically


def finish_winners(job: Job) -> Facts:
    """Finish the winners of each front; one that did not become better on validation data keeps the supernet's weights."""
    chosen = dict.fromkeys(c.architecture for goal_winners in chosen_winners(job).values() for c in goal_winners)
    supernet_macs = job.supernet_macs
    if supernet_macs is None:
        raise UserError(
            "the supernet was trained by an earlier version, its cost is unknown; train it again: stages=[supernet]"
        )
    macs = job.finish.share * supernet_macs
    epochs = {a: finishing_epochs(job.space, a, job.train_images, macs, len(chosen)) for a in chosen}
    networks = {a: known for a in chosen if (known := _known(_folder(job, a).with_suffix(".json"), a)) is not None}
    missing = [a for a in chosen if a not in networks]
    done = {a: epochs[a] if a in networks else 0 for a in chosen}
    begin = time.perf_counter()

    def on_epoch(index: int, epoch: int) -> None:
        done[missing[index]] = epoch
        job.progress.advance(f"epochs of {len(chosen)} winners", sum(done.values()), sum(epochs.values()))

    if missing:
        trainer = Finisher(job.supernet, job.evaluator, job.ready_data, job.finish, job.seed, job.processes.single)
        wanted = [((a, epochs[a]), _folder(job, a)) for a in missing]
        for index, finished in Trainings(job.workforce.pool, trainer).run(wanted, on_epoch):
            architecture = missing[index]
            seconds, begin = time.perf_counter() - begin, time.perf_counter()
            networks[architecture] = _kept(job, architecture, epochs[architecture], finished, seconds)
    found = [networks[a] for a in chosen]
    teacher_macs = max(epochs.values(), default=0) * job.train_images * job.space.network(job.space.largest()).macs
    better = [n for n in found if n["kept"] == "finished"]
    gain = sum(n["accuracy_after"] - n["accuracy_before"] for n in better) / max(1, len(found))
    job.progress.say(
        f"  {len(found)} winners finished, {len(better)} became better; mean validation accuracy {100 * gain:+.1f} points"
    )
    return {"networks": found, "teacher_macs": teacher_macs, "files": [n["file"] for n in better]}


def _folder(job: Job, architecture: Architecture) -> Path:
    """With the checkpoint of a winner; its weights and facts stand beside it."""
    return job.path(FINISHED_FOLDER) / architecture_key(architecture)


def _kept(job: Job, architecture: Architecture, epochs: int, finished: Finished, seconds: float) -> Facts:
    """Write down what became of a winner; `seconds` passed since the one before it."""
    folder = _folder(job, architecture)
    file = folder.with_suffix(".safetensors")
    if finished.weights is not None:
        write_atomically(file, finished.weights)
    facts = {
        "architecture": dict(architecture),
        "kept": "inherited" if finished.weights is None else "finished",
        "file": str(file.relative_to(job.run.path)),
        "epochs": epochs,
        "macs": finished.macs,
        "seconds": seconds,
        "accuracy_before": finished.before,
        "accuracy_after": finished.after,
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
