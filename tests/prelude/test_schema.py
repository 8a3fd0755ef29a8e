# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON within limits, and values held against a declaration."""

from typing import Any

import pytest

from pkramfs import schema
from pkramfs.schema import Invalid

ENTRY = schema.Object(
    {"name": schema.Maybe(schema.Text(5)), "at": schema.Range(10)},
    optional={"sizes": schema.ListOf(schema.Whole(0, 9)), "how": schema.OneOf(("a", schema.Flag(), 1))},
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[1", "not JSON"),
        ("[1] 2", "not JSON"),
        ("NaN", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice, expected each key once"),
        ('{"x": {"\\ud800": 1, "\\ud800": 3}}', "there twice"),
        ("[" * 33 + "]" * 33, "nested more than 32 levels deep"),
        ("[" * 1_000_000, "nested more than 32 levels deep"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested more than 32 levels deep"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_what_is_more_or_less_than_json_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Invalid) as refused:
        schema.parse(text.encode())
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_json_is_read() -> None:
    assert schema.parse("[" * 32 + "]" * 32) is not None
    assert schema.parse(b'{"a": "\xff\xc3\xa9"}') == {"a": "\udcff\xe9"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "not a JSON object but []"),
        ({"at": [0, 1]}, "name is missing, expected text of at most 5 bytes or null"),
        ({"name": "éé\udcff\udcff", "at": [0, 1]}, "name is '\\xe9\\xe9\\udcff\\udcff'"),
        ({"name": "a\0", "at": [0, 1]}, "name is 'a\\x00'"),
        ({"name": "\ud800", "at": [0, 1]}, "name is '\\ud800'"),
        ({"name": None, "at": [1, 1]}, "at is [1, 1], expected [start, end) in pages, not empty and at most 10"),
        ({"name": None, "at": [0, 11]}, "at[1] is 11, expected a whole number from 0 to 10"),
        ({"name": None, "at": [False, 1]}, "at[0] is False"),
        ({"name": None, "at": [0.0, 1]}, "at[0] is 0.0"),
        ({"name": None, "at": [0, 1, 2]}, "at is [0, 1, 2]"),
        ({"name": None, "at": [0, 1], "sizes": [1, 2, 10]}, "sizes[2] is 10"),
        ({"name": None, "at": [0, 1], "sizes": {}}, "sizes is {}, expected a list"),
        ({"name": None, "at": [0, 1], "how": 0}, "how is 0, expected 'a' or true or false or 1"),
        ({"name": None, "at": [0, 1], "how": 1.0}, "how is 1.0"),
        ({"name": None, "at": "x" * 10**6}, "at is 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
    ],
)
def test_a_refusal_names_field_what_was_found_and_expected(value: Any, reason: str) -> None:
    with pytest.raises(Invalid) as refused:
        ENTRY.read(value)
    assert reason in str(refused.value) and str(refused.value).isascii()


def test_what_is_declared_comes_back_and_nothing_else() -> None:
    found = ENTRY.read({"name": "é\udcff", "at": [0, 10], "how": True, "more": 1})
    assert found == {"name": "é\udcff", "at": (0, 10), "how": True}
    open_one = schema.Object({}, others=schema.Anything())
    assert open_one.read({"more": [1]}) == {"more": [1]}
    with pytest.raises(Invalid, match="more is unknown, expected only what this version writes"):
        schema.Object({}, closed=True).read({"more": 1})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, "1", 1e301, -1, 10**400])
def test_a_number_is_finite_and_in_range(value: Any) -> None:
    with pytest.raises(Invalid, match="expected a number from 0 to 1e"):
        schema.Number(0).read(value, "x")
    assert schema.Number(0).read(7) == 7.0
