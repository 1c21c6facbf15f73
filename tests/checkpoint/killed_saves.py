"""A program that forks savers, kills them at random moments, and holds the directory against what they reported.

``python killed_saves.py DIRECTORY RANKS KILLS SEED``. The last line says how the kills fell.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as c10d

from gptcore import checkpoint
from gptcore.checkpoint import Slice
from gptcore.dist import Member, member_of

ELEMENTS = 200_000


def save_forever(place: Path, store: Path, rank: int, ranks: int, report: int) -> None:
    """Even steps at once, odd ones in the thread; every step is reported when the checkpoint is said to be safe."""
    torch.set_num_threads(1)
    member: Member | None = None
    if ranks > 1:
        c10d.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        member = member_of("killed_saves")
    there = checkpoint.steps(place)
    step = there[-1] if there else 0
    start, stop = rank * ELEMENTS // ranks, (rank + 1) * ELEMENTS // ranks
    writer = checkpoint.Writer(place, keep_last=2, keep_every=7, member=member)
    while True:
        step += 1
        tensors = {"w": Slice(torch.full((stop - start,), float(step)), start, (ELEMENTS,))}
        if step % 2:
            writer.begin(step, tensors, {"value": step})
            writer.wait()
        else:
            checkpoint.save(place, step, tensors, {"value": step}, keep_last=2, keep_every=7, member=member)
        os.write(report, b"%d\n" % step)


def fork(place: Path, store: Path, rank: int, ranks: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(
                os.devnull, "w"
            ) as sys.stderr:  # the survivor of two complains that its partner is gone
                save_forever(place, store, rank, ranks, writing)
        finally:
            os._exit(1)
    os.close(writing)
    return child, reading


def kill_once(place: Path, store: Path, ranks: int, draw: random.Random) -> str:
    """Start savers, let one save end, kill them after a random time; the state they were killed in."""
    before = len(checkpoint.steps(place))
    children = [fork(place, store, rank, ranks) for rank in range(ranks)]
    for _, reading in children:
        assert select.select([reading], [], [], 60)[0], "no save ended within a minute"
    time.sleep(draw.uniform(0, 0.05))
    draw.shuffle(children)
    for child, _ in children:
        os.kill(child, signal.SIGKILL)
        time.sleep(draw.choice([0, 0.005]))
    for child, _ in children:
        os.waitpid(child, 0)
    reported = min(int(os.read(reading, 1 << 20).split()[-1]) for _, reading in children)
    for _, reading in children:
        os.close(reading)
    hidden = [name for name in os.listdir(place) if name.startswith(".")]
    found = checkpoint.load_latest(place, warn=lambda sentence: sys.exit(f"damaged: {sentence}"))
    assert found is not None and found.state["step"] >= reported, f"step {reported} was reported and is gone"
    assert bool((found.tensors["w"] == found.state["value"]).all()) and len(found.tensors["w"]) == ELEMENTS
    for step in range(7, reported + 1, 7):
        assert checkpoint.path_of(place, step).is_dir(), f"step {step} was to stay"
    checkpoint.clean(place)
    assert all(name.startswith("step-") for name in os.listdir(place)), os.listdir(place)
    assert len(checkpoint.steps(place)) > min(before, 1)
    return "while writing" if hidden else "between saves"


def main() -> None:
    place, ranks, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    place.mkdir()
    fell = [kill_once(place, place.with_name(f"store{i}"), ranks, draw) for i in range(kills)]
    print(f"{fell.count('while writing')} of {kills} kills left a half-written checkpoint")


if __name__ == "__main__":
    main()
