"""gptcore's PPO over a setting that ``bench.ppo`` wrote: the counterpart of ``peers/trl_ppo/episodes.py``.

python -m bench.ppo_episodes SETTING.json        prints one JSON object
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gptcore  # noqa: F401  before torch, so that MKL is asked for fixed bits


def main() -> None:
    import torch

    from bench.peers.trl_ppo.record import Record
    from gptcore import backend, from_hf
    from gptcore.align import ppo
    from gptcore.align.answers import Prompts
    from gptcore.align.reinforcement_spec import PPOSpec, settings
    from gptcore.data.chat import Chat
    from gptcore.data.records import Task

    setting = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(setting["threads"])
    backend.set_num_threads(setting["threads"])
    record = Record()
    dtype = getattr(torch, setting["dtype"])
    actor, reference = from_hf(setting["model"], dtype=dtype), from_hf(setting["model"], dtype=dtype)
    tokenizer = words(setting["words"])
    tasks = [Task(tokenizer.decode(ids)) for ids in setting["prompts"]]
    table = {
        "run_dir": setting["out"], "steps": setting["updates"], "dtype": setting["dtype"],
        "optimizer": {"lr": setting["lr"]}, "checkpoint": {"every": 0},
        "ppo": {
            "episodes": setting["episodes"], "minibatch": setting["minibatch"], "epochs": setting["epochs"],
            "max_new_tokens": setting["response"], "beta": setting["beta"], "kl_estimator": "k1",
            "critic": setting["critic"], "sample_every": 0,
        },
    }  # fmt: skip
    config, spec = settings(PPOSpec, table, actor.config)
    prompts = Prompts(tasks, Chat(tokenizer, None), room=setting["prompt_length"])
    reward = _reward(setting, record)
    ppo.run(config, spec, actor=actor, reference=reference, prompts=prompts, reward=reward, quiet=True)
    print(record.finish())


def words(count: int) -> Any:
    """A tokenizer of ``count`` characters in a row and an end: letters where they are enough."""
    from gptcore.data.characters import CharacterTokenizer

    first = ord("a") if count <= 26 else 0x1000
    return CharacterTokenizer("".join(chr(first + place) for place in range(count)))


def _reward(setting: dict[str, Any], record: Any) -> Any:
    from bench.peers.trl_ppo.worth import worth

    def reward(answers: Sequence[Any]) -> list[float]:
        scores = [worth(setting, [*a.prompt_ids.tolist(), *a.response_ids.tolist()]) for a in answers]
        record.judged(scores)
        return scores

    return reward


if __name__ == "__main__":
    main()
