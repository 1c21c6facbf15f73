"""A character-level GPT on TinyShakespeare, over several seeds: the whole pipeline as a program.

    python examples/recipes/shakespeare_char.py tinyshakespeare.txt --seeds 3

The first nine tenths train, the last tenth is held out; 0.8M parameters, 2000 updates of 12 rows of 64
characters. nanoGPT's README gives 1.88 nats per character for this size. Each seed has its own run directory,
and a run that was stopped goes on when the program is started again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from gptcore import train
from gptcore.data import tokenizer as tokenizers
from gptcore.data.dataset import MANIFEST, TokenDataset
from gptcore.data.loader import Loader
from gptcore.data.prepare import prepare
from gptcore.models import GPT

CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare_char.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", help="path of the text")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many runs (3)")
    parser.add_argument("--out", default="runs/shakespeare_char", metavar="DIR", help="where the runs live")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as steps=200")
    args = parser.parse_args()

    out = Path(args.out)
    losses = []
    for number in range(args.seeds):
        settings = [f"seed={1337 + number}", f"run_dir={out / f'seed-{number}'}", f"data.path={args.text}"]
        config = train.load(CONFIG, [*settings, *args.set])
        result = run(config, out / "data")
        losses.append(result.evaluation["val_loss"])
        print(f"seed {config.seed}: held-out loss {losses[-1]:.4f} in {result.seconds:.0f} s", flush=True)
    print(f"median of {len(losses)}: {statistics.median(losses):.4f} nats per character")


def run(config: train.TrainConfig, data: Path) -> train.Result:
    """Prepare the text once, build tokenizer, loader and model, and train."""
    spec = config.data
    if not (data / MANIFEST).exists():
        prepare(spec.path, data, tokenizer="characters", val_fraction=spec.held_out, split="tail")
    tokenizer = tokenizers.load(data)
    held_out = Loader(TokenDataset.open(data, "val"), spec.batch, spec.length, seed=0, mode=spec.mode)
    return train.run(
        config,
        model=GPT(config.model_config(tokenizer.vocab_size), seed=config.seed),
        loader=Loader(
            TokenDataset.open(data, "train"), spec.batch, spec.length, seed=config.seed, mode=spec.mode
        ),
        evaluate=train.held_out(held_out, config.evaluation.batches),
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    main()
