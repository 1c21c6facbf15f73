"""``gptcore VERB``: finds the verb, runs it, and turns errors into one sentence and an exit code.

Exit codes: 0 done; 2 the user can mend it (bad input, a missing or damaged file, a full disk); 130 stopped
with Ctrl-C. Anything else is a bug and shows its traceback.

Only the called verb's file is imported, and heavy packages only when it runs, so that help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from gptcore import __version__
from gptcore.errors import UserError, unknown_name

VERBS = {
    "quickstart": "train a small GPT on text found on this machine, in two minutes",
    "road": "pretrain, fine-tune, learn from rankings and report, offline",
    "prepare": "turn text into a tokenizer and token shards",
    "train": "train a GPT, or continue a run",
    "sft": "fine-tune a trained GPT on demonstrations",
    "constitution": "criticise and revise a model's answers by written principles",
    "ppo": "improve a model by rewards, with a critic and, mixed in, the text it was pretrained on",
    "grpo": "improve a model by rewards compared within a group: GRPO, RLOO and their kin",
    "expert-iteration": "improve a model by imitating its own best answers",
    "reward": "train a reward model on rankings",
    "dpo": "learn from preferences without a reward model",
    "redteam": "attack a model that has a secret, and say how often it tells",
    "compare": "let assistants answer the same prompts, and judge them in pairs",
    "generate": "continue a text with a trained GPT",
    "convert": "turn a Hugging Face model into a run, or a run into one",
    "checkpoint": "verify, show, reshard, export and import checkpoints",
    "info": "show versions, instruction sets, threads and devices",
    "report": "write one HTML file about a run, or about several side by side",
    "presets": "list the model sizes that have a name",
    "plan": "say what a training run needs: memory, traffic, FLOPs, hours and cost",
}

_DESCRIPTION = "Train and run GPTs with native kernels. Start with 'gptcore quickstart'."
_EPILOG = """'gptcore VERB --help' explains a verb, with examples.
GPTCORE_TRACEBACK=1 shows where an error arose."""


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, and knows what was probably meant."""

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments: ") and words[0].startswith("--"):
            options = [name for name in self.options() if name.startswith("--")]
            raise unknown_name("option", words[0].partition("=")[0], options)
        raise UserError(f"{message}; 'gptcore {self.verb} --help' explains".replace("  ", " "))

    def options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    @property
    def verb(self) -> str:
        return self.prog.partition(" ")[2]


def build_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb."""
    module = _module(verb)
    description, _, examples = (module.__doc__ or "").partition("\nExamples:\n")
    parser = _Parser(
        prog=f"gptcore {verb}",
        description=description.strip(),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"gptcore.cli.{verb.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``gptcore`` with ``argv`` (default: the process's arguments); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("\ngptcore: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe went away; Python would complain once more while flushing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get("GPTCORE_TRACEBACK"):
            raise
        print(f"gptcore: error: {sentence}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"gptcore {__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        raise unknown_name("command", verb, VERBS)
    try:
        args = build_parser(verb).parse_args(words[1:])
    except SystemExit as request:  # --help
        return int(request.code or 0)
    return int(_module(verb).run(args))


def overview() -> str:
    """What ``gptcore --help`` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    usage = "usage: gptcore VERB [options]\n       gptcore [--help | --version]"
    return "\n".join([usage, "", _DESCRIPTION, "", *lines, "", _EPILOG])


def explain(error: Exception) -> str | None:
    """One sentence for the user, or None where the error is not the user's to mend."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "not enough memory; take a smaller model, batch or length"
    if isinstance(error, (ValueError, TypeError, ImportError)):
        return " ".join(str(error).split())
    return None
