"""The YAML reader: plain values only, nothing twice, everything bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.yaml_file import FILE_BYTES_MAX, parse_yaml, read_yaml
from protocol.errors import ConfigError

pytestmark = pytest.mark.pure

HERE = Path("c.yaml")


def test_switch_words_are_text_and_numbers_are_numbers() -> None:
    """`rebalance: off` must reach a policy as a word. Seen to fail with yaml.SafeLoader."""
    tree = parse_yaml("a: off\nb: yes\nc: true\nd: 12\ne: 1.5\nf:\ng: 2024-01-02\nh: '7'", HERE).tree
    assert tree == {"a": "off", "b": "yes", "c": True, "d": 12, "e": 1.5, "f": None, "g": "2024-01-02", "h": "7"}


def test_lines_of_keys_are_remembered() -> None:
    read = parse_yaml("a:\n  b: 1\n\n  c: [1, 2]\n", HERE)
    assert read.place(("a", "c")) == "c.yaml:4" and read.place(("nowhere",)) == "c.yaml:1"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    assert parse_yaml(text, HERE).tree == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3", "c.yaml:3: a is given twice"),
        ("x: {a: 1, a: 2}", "x.a is given twice"),
        ("[1, 2]", "expected sections such as `model:`.*found a list"),
        ("word", "found a single value"),
        ("a: [1, 2\n", "c.yaml:2: "),
        ("a: 1\n\tb: 2", "c.yaml:2: "),
        ("a: !!python/object/apply:os.system [ls]", "c.yaml:1: "),
        ("a: 1\n--- \nb: 2", "expected a single document"),
        ("[" * 40 + "]" * 40, "32 levels"),
        ("? [a, b]\n: 1", "a key must be a word"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_yaml(text, HERE)


def test_aliases_cannot_blow_up() -> None:
    """Nine levels of ten aliases stand for a thousand million values. Seen not to end without the count of nodes."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 20,000 values"):
        parse_yaml("\n".join(levels), HERE)


def test_what_cannot_be_read_names_the_flag(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe")
    for path, sentence in [(tmp_path / "none", "No such file.*check --config"), (big, "the limit is 1,048,576"), (binary, "not UTF-8")]:
        with pytest.raises(ConfigError, match=sentence):
            read_yaml(path)
