"""Turn text into a tokenizer and token shards, split into a training and a held-out part.

INPUT is a .txt, .jsonl or .parquet file (also .zst or .gz), a directory of them, or 'builtin': text found
on this machine, mostly about programming. The result is one directory, which appears only when it is whole.

Examples:
  gptcore prepare book.txt --out data/book --vocab-size 4096
  gptcore prepare shakespeare.txt --out data/shakespeare --tokenizer characters --held-out 0.1
  gptcore prepare crawl/ --out data/crawl --tokenizer data/book --text-field content
  gptcore prepare builtin --out data/builtin
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gptcore.errors import UserError
from gptcore.report.progress import format_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="+", metavar="INPUT", help="files, directories, or 'builtin'")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="NAME",
        help="bpe, characters or bytes, made from the text; or a tokenizer.json or directory (bpe)",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="size of a bpe vocabulary (8192)")
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="X", help="share kept for evaluation (0.1)"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet (text)"
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help="what stands between the documents of a .txt file"
    )
    parser.add_argument("--replace", action="store_true", help="replace an existing DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress line")


def run(args: argparse.Namespace) -> int:
    from gptcore.data.dataset import MANIFEST
    from gptcore.data.prepare import prepare

    if (Path(args.out) / MANIFEST).is_file() and not args.replace:
        raise UserError(f"{args.out} already holds prepared data; give --replace, or another --out")
    made = prepare(
        args.input,
        args.out,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.held_out,
        text_field=args.text_field,
        separator=args.separator,
        overwrite=args.replace,
        quiet=args.quiet,
    )
    print(f"tokenizer: {made.tokenizer.kind}, {made.tokenizer.vocab_size} tokens")
    for part, name in (("train", "training"), ("val", "held out")):
        if part in made.tokens:
            tokens, size = made.tokens[part], made.text_bytes[part]
            print(
                f"{name}: {made.documents[part]} documents, {format_count(tokens)} tokens, "
                f"{size / tokens:.2f} bytes per token"
            )
    print(f"next: gptcore train {args.out} --out runs/{Path(args.out).name}")
    return 0
