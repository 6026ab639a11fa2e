"""Flags come from a dataclass: groups, choices and limits are its fields' own; what is wrong is named in a
sentence."""
from __future__ import annotations

from dataclasses import dataclass

import pytest

from model import DecoderConfig
from support.formats.files import UserError
from support.plumbing.cli import (check_settings, make_parser, parse_flags, parse_options, parse_weighted,
                                  run_cli, setting)


@dataclass
class Flags:
    kind: str = setting("plain", "which one", "what", choices=("plain", "fancy"))
    words: list = setting([], "some words", nargs="+", action="extend")
    share: float = setting(None, "100 % is all", "how much")
    rounds: int = setting(3, "how often", least=1)
    loud: bool = setting(False, "with noise")


def flags(*argv: str) -> Flags:
    parsed = Flags(**vars(parse_flags(make_parser(Flags, "a test"), list(argv))))
    check_settings(parsed)
    return parsed


def test_every_field_is_a_flag_of_its_type():
    assert flags() == Flags()
    given = flags("--kind", "fancy", "--words", "a", "b", "--words", "c", "--share", "0.5", "--rounds", "2",
                  "--loud")
    assert given == Flags("fancy", ["a", "b", "c"], 0.5, 2, True)
    assert not flags("--loud", "--no-loud").loud


def test_help_has_groups_choices_and_defaults_and_fits_the_page():
    text = make_parser(Flags, "a test").format_help()
    assert text.index("what:") < text.index("--kind") < text.index("how much:") < text.index("--share")
    assert "which one: plain, fancy (default: plain)" in text and "100 % is all" in text
    assert "--no-loud" not in text and all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize("argv, words", [
    (["--kind", "plian"], 'unknown kind "plian"; did you mean "plain"'),
    (["--rounds", "0"], "--rounds 0: must be at least 1"),
    (["--rounds", "many"], "--rounds"), (["--round", "2"],
                                         'unknown argument "--round"; did you mean "--rounds"'),
], ids=" ".join)
def test_a_wrong_flag_is_named(argv, words):
    with pytest.raises(UserError) as e:
        flags(*argv)
    assert words in str(e.value)


def test_options_are_json_or_text():
    assert parse_options(["a=1", "b=true", "c=True", "d=random", "e=[1, 2]"]) == {
        "a": 1, "b": True, "c": True, "d": "random", "e": [1, 2]}
    with pytest.raises(UserError, match="write name=value"):
        parse_options(["width"])


def test_data_sets_have_weights():
    assert parse_weighted("shapes") == [("shapes", 1.0)]
    assert parse_weighted("coco:DIR + interleaved:DIR * 0.2") == [("coco:DIR", 1.0), ("interleaved:DIR", 0.2)]
    with pytest.raises(UserError, match='the weight "two" is no number'):
        parse_weighted("shapes + shapes * two")


def test_a_mistake_exits_with_2_and_a_bug_shows_its_traceback(capsys):
    def mistake():
        raise UserError("no such file.")

    def number():
        DecoderConfig(width=30, heads=4, kv_heads=3)    # the math refuses this number

    def bug():
        raise ValueError("a library's")

    for wrong in (mistake, number):
        with pytest.raises(SystemExit) as e:
            run_cli(wrong)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="a library's"):
        run_cli(bug)
