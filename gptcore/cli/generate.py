"""Continue a text with a trained GPT, printing it as it comes.

The text goes to standard output, everything else to standard error. Without --prompt the prompt is read from
standard input; an empty one starts at the beginning of a document. When the model's context is full, the
older half of it is forgotten and generation goes on.

--chat puts the prompt, as what a user says, into the chat template kept with the model, and prints the answer
alone; the answer ends where the template ends one.

Examples:
  gptcore generate runs/quickstart --prompt "The function returns"
  gptcore generate runs/quickstart --prompt "def main" --temperature 0 --max-new-tokens 50
  gptcore generate runs/quickstart --prompt "A list" --samples 3 --seed 7 --stop "."
  gptcore generate runs/quickstart/checkpoints/step-00000500 < prompt.txt
  gptcore generate runs/sft/best --chat --prompt "What is the capital of France?"
  gptcore generate models/gpt2 --prompt "In 1905"          a directory with config.json, weights, tokenizer
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.data.vocabulary import Tokenizer
    from gptcore.infer import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory of a run or a Hugging Face model, or one checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from FILE")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most N tokens (200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 is greedy, 1 the model's own (0.8)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens (all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="keep the likeliest tokens up to P (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (0)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations to write (1)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at TEXT; may be given again"
    )
    parser.add_argument(
        "--chat", action="store_true", help="ask by the model's chat template, print the answer"
    )
    parser.add_argument("--ignore-end", action="store_true", help="go on after the end of a document")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one kept with the run")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: what the machine gives")
    parser.add_argument("--quiet", action="store_true", help="print the text only")


def run(args: argparse.Namespace) -> int:
    from gptcore import backend
    from gptcore.infer import generate_batch, load

    prompt = _prompt(args)
    if args.threads:
        backend.set_num_threads(args.threads)
    model, tokenizer = load(args.model, args.tokenizer)
    single = args.samples == 1
    asked, end_ids = _asked(args, prompt, tokenizer) if args.chat else (prompt, None)
    shown = "" if args.quiet or args.chat else prompt
    if single:
        _print(shown)
    results = generate_batch(
        model,
        tokenizer,
        [asked],
        num_samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        ignore_end=args.ignore_end,
        end_ids=end_ids,
        overflow="slide",
        stream=(lambda _, piece: _print(piece)) if single else None,
    )
    if single:
        print()
    else:
        for number, result in enumerate(results, 1):
            print(f"--- sample {number} ---\n{shown}{result.text}")
    if not args.quiet:
        print(f"gptcore: {_summary(results)}", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """The prompt as given; from a file or standard input without its last line break."""
    if args.prompt is not None:
        return str(args.prompt)
    try:
        if args.prompt_file is not None:
            text = Path(args.prompt_file).read_bytes().decode()
        else:
            if sys.stdin.isatty():
                print("gptcore: type the prompt, then Ctrl-D", file=sys.stderr)
            text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.removesuffix("\n")


def _asked(args: argparse.Namespace, prompt: str, tokenizer: Tokenizer) -> tuple[list[int], tuple[int, ...]]:
    """The prompt in the template of the model, and the tokens that end an answer."""
    from gptcore.data import chat, chat_template
    from gptcore.infer.trained import tokenizer_place

    place = tokenizer_place(args.model)
    if not chat_template.is_there(place):
        raise UserError(
            f"--chat: {place} holds no chat template; leave --chat out, or fine-tune the model with one ('gptcore sft')"
        )
    found = chat.chat_for(tokenizer, place)
    return found.prompt_ids(prompt), found.stop_ids


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _summary(results: list[Generation]) -> str:
    timing, slides = results[0].timing, max(result.slides for result in results)
    sentence = (
        f"prompt of {timing.prefill_tokens} tokens at {timing.prefill_rate:.0f} tokens/s, "
        f"{timing.decode_tokens} more at {timing.decode_rate:.0f} tokens/s; "
        f"ended by {', '.join(sorted({result.finish_reason for result in results}))}"
    )
    return sentence + (f"; the context was full {slides} times" if slides else "")
