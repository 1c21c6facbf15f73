"""The command line's public surface, frozen: a change here is a change for users and needs CHANGELOG.md."""

from gptcore.cli.main import VERBS, build_parser

REWARDED = [
    "MODEL", "TASKS...", "--config", "--gold", "--out", "--quiet", "--reference", "--reward", "--set", "--steps",
    "--text", "--zero",
]  # fmt: skip
SURFACE = {
    "quickstart": ["--out", "--quiet", "--seed", "--short", "--steps"],
    "prepare": [
        "INPUT...", "--held-out", "--out", "--quiet", "--replace", "--separator", "--text-field", "--tokenizer",
        "--vocab-size",
    ],
    "train": [
        "WHAT...", "--change", "--config", "--no-fixed-tree", "--out", "--quiet", "--replay", "--resume", "--set",
        "--start", "--steps", "--strategy", "--zero",
    ],
    "sft": [
        "DATA...", "--config", "--epochs", "--lora", "--out", "--quiet", "--resume", "--set", "--start", "--steps",
        "--template", "--zero",
    ],
    "reward": [
        "DATA...", "--config", "--epochs", "--lora", "--members", "--out", "--quiet", "--resume", "--set", "--start",
        "--steps", "--template", "--zero",
    ],
    "dpo": [
        "DATA...", "--config", "--epochs", "--lora", "--loss", "--out", "--quiet", "--resume", "--set", "--start",
        "--steps", "--template", "--zero",
    ],
    "constitution": ["MODEL", "--answers", "--critic", "--out", "--prompts", "--seed", "--tokens"],
    "ppo": REWARDED,
    "grpo": REWARDED,
    "expert-iteration": REWARDED,
    "redteam": [
        "MODEL", "--attacks", "--out", "--part", "--questions", "--seed", "--temperature", "--tokens", "--writer",
        "--written",
    ],
    "compare": ["MODEL...", "--judge", "--out", "--prompts", "--seed", "--tasks", "--temperature", "--tokens"],
    "road": ["--fast", "--out", "--quiet", "--seed", "--set"],
    "generate": [
        "MODEL", "--chat", "--ignore-end", "--max-new-tokens", "--prompt", "--prompt-file", "--quiet", "--samples",
        "--seed", "--stop", "--temperature", "--threads", "--tokenizer", "--top-k", "--top-p",
    ],
    "convert": ["SOURCE", "TARGET", "--dtype", "--family", "--tokenizer"],
    "checkpoint": [
        "ACTION", "PATH", "--format", "--json", "--only", "--out", "--quiet", "--shards", "--step", "--tensors",
    ],
    "report": ["RUN...", "--out", "--title"],
    "info": ["--json"],
    "presets": ["NAME"],
    "plan": [
        "CONFIG", "--batch", "--checkpointing", "--device", "--dtype", "--gpus", "--grain", "--json", "--length",
        "--memory", "--mfu", "--no-fixed-tree", "--offload", "--price", "--set", "--tflops", "--tokens",
    ],
}  # fmt: skip


def surface(verb):
    positional, options = [], []
    for action in build_parser(verb)._actions:
        if action.option_strings:
            options += [name for name in action.option_strings if name not in ("-h", "--help")]
        else:
            name = (action.metavar or action.dest).upper()
            positional.append(name + ("..." if action.nargs in ("*", "+") else ""))
    return positional + sorted(options)


def test_verbs_and_options_are_as_announced():
    assert {verb: surface(verb) for verb in VERBS} == SURFACE
