"""``gptcore presets``: the table, and a preset as a config that reads back as itself."""

import sys

import pytest

from gptcore.cli.main import main
from gptcore.models import GPTConfig, presets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_table_has_every_preset_with_its_sizes(capsys):
    assert main(["presets"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "N", "L", "C", "H", "Hkv", "D", "F", "V", "T", "SOURCE"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert list(rows) == presets.names()
    assert rows["gpt2"][1:10] == ["124M", "12", "768", "12", "12", "64", "3072", "50257", "1024"]
    assert rows["llama2-70b"][1:10] == ["69.0B", "80", "8192", "64", "8", "128", "28672", "32000", "4096"]
    assert "Table 2.1" in " ".join(rows["gpt3-xl"])


@pytest.mark.parametrize("name", presets.names())
def test_details_are_a_config_file_of_the_preset(name, capsys):
    assert main(["presets", name]) == 0
    out = capsys.readouterr().out
    assert GPTConfig.from_dict(tomllib.loads(out)["model"]) == presets.get(name)
    assert f"# source: {presets.describe(name).source}" in out
