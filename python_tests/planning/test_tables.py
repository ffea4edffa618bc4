"""Tables for terminals and pages."""

from __future__ import annotations

from flashu_ext.planning.tables import markdown_table, text_table

ROWS = [("op", "us"), ("norm", "1.5"), ("a", "")]


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert text_table(ROWS) == "op    us\nnorm  1.5\na"
    assert text_table(ROWS, rule=True) == "op    us\n----  ---\nnorm  1.5\na"


def test_markdown_has_a_rule_under_its_header() -> None:
    assert markdown_table(ROWS) == "| op | us |\n|---|---|\n| norm | 1.5 |\n| a |  |"
