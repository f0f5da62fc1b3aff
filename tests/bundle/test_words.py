# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Whatever files, sections, options and metadata are called: texts reach the shell, MONAI and the terminal as texts."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from monai_ifim.bundle.configs import Config
from monai_ifim.bundle.findings import Findings, find
from monai_ifim.bundle.overlay import Overlay, overlays, run_command
from monai_ifim.bundle.stacks import Workflow
from monai_ifim.bundle.words import argument, command_line, literal, parsed, say, shown
from tests.bundle.bundles import alone, metadata, part

some = settings(derandomize=True, deadline=None, max_examples=40)
NASTY = "\n\r\t\0\x1b\x85\xa0\u2028\u2029\u200b\ufeff\ud800\udcff é日😀 $`'\"\\;&|<>(){}[]*?!~#@%:=,+-^."
letters = st.one_of(st.sampled_from(NASTY), st.characters())
texts = st.lists(letters, max_size=12).map("".join)
names = texts.map(lambda text: text.replace("\0", "").replace("/", ""))
INJECTED = "a\u2028INJECTED: 1\u2029INJECTED: 1\x85INJECTED: 1\nINJECTED: 1\rINJECTED: 1\x0bINJECTED: 1\x0cINJECTED: 1"
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def words_in_bash(command: str) -> list[str]:
    """The words behind ``python`` and ``torchrun`` in a command, as bash takes them."""
    script = f"""python() {{ printf '%s\\0' "$@"; }}; torchrun() {{ python "$@"; }}; {command}"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd="/", check=True)
    assert done.stderr == b""
    return [word.decode("utf-8", "surrogateescape") for word in done.stdout.split(b"\0")[:-1]]


@some
@given(
    st.lists(texts.map(lambda text: text.encode("utf-8", "ignore").decode().replace("\0", "")), min_size=1, max_size=4)
)
@example(["$(touch CANARY)", "`touch CANARY`", "a'b\"c", "evaluating; touch CANARY; true", "['a', 'b']", "['$x']", ""])
def test_a_shell_takes_every_word_as_it_is(words: list[str]):
    assert words_in_bash(f"python {command_line(words)}") == words


@some
@given(VALUES)
@example("...")
@example("a # b")
@example("-x")
@example("(" * 3)
@example(["'", '"'])
def test_monai_reads_every_value_as_it_is_and_nothing_in_its_text_is_invisible(value: Any):
    text = argument(value)
    assert parsed(text) == value
    assert type(parsed(text)) is type(value)
    assert text.isprintable()


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}.__iter__()])
def test_a_value_that_no_text_stands_for_is_refused(value: Any):
    with pytest.raises(ValueError, match="put it into a config file"):
        argument(value)


@some
@given(st.lists(names.filter(bool), min_size=1, max_size=3), names.filter(bool), names.filter(bool), VALUES)
@example(["train$(touch C).json", "train`touch C`.json", "t'x.json"], "PATH'ut 1\n.yaml", "$(touch C)", "--a 'b'")
def test_the_command_names_the_very_files_section_and_options(files: list[str], overlay: str, section: str, value: Any):
    findings = Findings(Workflow("a", tuple(files), Config({}), section=section))
    command = run_command(findings, overlay, {"net#a": value})
    assert command.isprintable()
    for shown_so in (command, command.encode("ascii", "backslashreplace").decode()):  # where the terminal has no more
        words = words_in_bash(shown_so)
        run = [] if section == "run" else [words.pop(3)]
        assert words[:4] == ["-m", "monai.bundle", "run", "--config_file"]
        assert [parsed(word) for word in run] == ([] if section == "run" else [section])
        assert not any(word.startswith("-") for word in run)  # fire would take it for an option
        assert parsed(words[4]) == [*files, overlay]
        assert parsed(words[5].partition("=")[2]) == value
        assert len(words) == 6


@some
@given(texts)
@example("mail@home#1 and %train and @#x and %##y and a::b")
def test_monai_takes_a_literal_in_an_expression_as_the_text(text: str):
    assert ConfigParser({"home": 1, "a": {"text": f"${literal(text)}"}}).get_parsed_content("a::text") == text


@some
@given(texts)
def test_what_is_shown_is_one_visible_line_that_says_the_same(text: str):
    assert shown(text).isprintable()
    plain = "".join(letter for letter in text if letter.isprintable())
    assert len(shown(text)) >= len(text)
    assert shown(plain) == plain


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_is_said_never_fails_and_has_no_control_characters(encoding: str, monkeypatch: pytest.MonkeyPatch):
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding, newline=""))
    say(f"first{NASTY}")
    sys.stdout.flush()
    said = stream.getvalue().decode(encoding)
    assert said.startswith("first\n")
    assert said.replace("\n", "").isprintable()


# Overlays


def overlay_of(config: dict[str, Any], said: dict[str, Any] | None = None, **options: Any) -> Overlay:
    findings = find(Workflow("inference", ("configs/inference.json",), Config(config)), metadata=said, **options)
    assert findings.refusal is None, findings.refusal
    return Overlay("configs/ifim.yaml", [findings])


KEYS = ["ifim", "ifim_figures", "ifim_saver", "+handlers"]


@some
@given(texts, texts)
@example(INJECTED, INJECTED)
@example("\u2028network: $1/0", "$__import__('os').system('touch CANARY')")
def test_nothing_in_the_metadata_becomes_more_than_a_comment(mask: str, name: str):
    said = metadata("classes", 2, {"0": name, "1": f"mask {mask}", "2": "b"})
    config = alone([], network=part("DenseNet", in_channels=3, out_channels=2))
    text = overlay_of(config, said).text()
    content = yaml.safe_load(text)
    plain = yaml.safe_load(overlay_of(config, metadata("classes", 2, {"0": "a", "1": "mask", "2": "b"})).text())
    channels = content["ifim"].pop("channel_mask")
    assert channels[1] is False
    plain["ifim"].pop("channel_mask")
    assert content == plain
    assert list(content) == KEYS
    assert text.isascii() or all(line.isprintable() for line in text.split("\n"))


@some
@given(texts)
@example("$__import__('os').system('touch CANARY')")
@example("@evaluator")
@example("%evaluator")
@example("a # b")
@example("# import this")
def test_an_output_key_reaches_the_metric_as_it_is(key: str):
    content = yaml.safe_load(overlay_of(alone([]), output_key=key).text())
    assert set(content["ifim"]) == {"_target_", "likelihood", "output_key", "on_error", "max_images"}
    parser = ConfigParser({"evaluator": 1, "key": content["ifim"]["output_key"]})
    if not ("@::" in key or "%::" in key):  # which MONAI takes for a place, in any text
        assert parser.get_parsed_content("key") == key


@some
@given(texts)
@example("a # b")
@example("%train")
@example(INJECTED)
def test_where_a_handler_writes_is_the_same_text_in_the_overlay(log_dir: str):
    config = {key: value for key, value in alone([]).items() if key not in ("output_dir", "bundle_root")}
    config["handlers"] = [part("TensorBoardStatsHandler", log_dir=log_dir), part("CheckpointSaver", save_dir="models")]
    config["train"] = "elsewhere"
    if "@#" in log_dir or ("%" in log_dir and log_dir != "%train") or "@::" in log_dir:
        return  # refers to what is not there
    content = yaml.safe_load(overlay_of(config).text())
    assert content["ifim_saver"]["output_dir"] == content["ifim_figures"]["log_dir"] == log_dir
    assert list(content) == KEYS


@some
@given(st.lists(names.filter(bool), min_size=2, max_size=4, unique=True))
@example(["a b", "a_b", "a#b", "x' + __import__('os').system('touch CANARY') + '"])
def test_workflows_of_any_names_have_places_of_their_own_that_are_plain(stems: list[str]):
    found = [Findings(Workflow(stem, (), Config({})), evaluator="e", output_dir="@o") for stem in stems]
    made = overlays(found)
    for property in (lambda overlay: overlay.file, lambda overlay: overlay.folder):
        assert len({property(overlay) for overlay in made}) == len(made)
    for overlay in made:
        content = yaml.safe_load(overlay.text())
        parser = ConfigParser({**content, "o": "out"})
        expected = f"out/{overlay.place}" if overlay.place else "out"
        assert parser.get_parsed_content("ifim_figures#log_dir") == expected
        assert Path(overlay.file).parent == Path("configs")
        assert parser.get_parsed_content("ifim_saver#folder") == overlay.folder
