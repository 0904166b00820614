"""Explains why a text is not YAML: the place, the line itself, and the cure, all in one line."""

from __future__ import annotations

import re

import yaml

from streammerge.lazy import late_pattern

_BREAK = late_pattern("\r\n|[\r\n\x85\u2028\u2029]")
_KEY = late_pattern(r"\s*(?:- +)*([^\s:#][^:#]*):(?:\s|$)")
_OF_A_MODEL = frozenset({"model", "parameters", "alias", "fisher", "gram", "layer_range", "filter", "value"})
"""Keys that belong in an entry of a list."""
_EXCERPT = 70
"""Characters of a line that are shown."""
_LONGEST = 4000
"""Characters of a line that are looked at."""

_CURES = (
    ("found unexpected end of stream", "quoted scalar", "the quote is never closed"),
    (
        "found unknown escape character",
        "",
        "in double quotes a backslash begins an escape: use single quotes, or two backslashes",
    ),
    ("expected ',' or ']'", "", "a comma or a closing ] is missing"),
    ("expected ',' or '}'", "", "a comma or a closing } is missing"),
    ("but found ']'", "", "a closing ] without its ["),
    ("but found '}'", "", "a closing } without its {"),
    ("could not find expected ':'", "", "a key needs ': ' and a value behind it"),
    ("cannot start any token", "", "quote the text that begins so"),
)
"""Words of PyYAML's problem and of its context, and the cure."""


def explain(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    """Return PyYAML's complaint, with line, column, excerpt and cure.

    Parameters
    ----------
    text
        The text that was read.
    line
        The line reached, if the error does not say where it is; counted from 0.
    """
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"line {line + 1}: {_problem(error)}"
    lines = [line[:_LONGEST] for line in _BREAK.split(text)]
    problem = _problem(error)
    if "'\\t'" in problem:
        return f"line {mark.line + 1}: tab character (indent and separate with spaces)"
    cure = _of_indentation(error, mark, lines) or _by_words(error, problem)
    return f"line {mark.line + 1}, column {mark.column + 1}: {cure or problem}{_excerpt(lines, mark)}"


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join((error.problem or error.context or "not YAML").split())
    if error.problem and error.context and error.context_mark:
        return f"{problem} ({error.context} which began on line {error.context_mark.line + 1})"
    return problem


def _by_words(error: yaml.MarkedYAMLError, problem: str) -> str | None:
    for words, context, cure in _CURES:
        if words in problem and context in (error.context or ""):
            return f"{problem}: {cure}"
    return None


def _of_indentation(error: yaml.MarkedYAMLError, mark: yaml.Mark, lines: list[str]) -> str | None:
    """Return the cure of a line that begins in the wrong column; None if the error is a different one."""
    problem, key = error.problem or "", _key(lines, mark.line)
    if problem.startswith("mapping values are not allowed"):
        return _second_colon(mark, lines, key)
    start = error.context_mark.line if error.context_mark else _next_line(lines, 0, 1)
    if "'<block sequence start>'" in problem:
        dash = next((n for n in range(mark.line - 1, -1, -1) if lines[n].lstrip().startswith("- ")), None)
        if dash is None:
            return "a list begins here, deeper than the keys before it: begin it below a key that ends in ':'"
        at = len(lines[dash]) - len(lines[dash].lstrip()) + 1
        return f"this dash is indented differently from that of line {dash + 1} (column {at}): align them"
    if (
        not problem.startswith(("expected <block end>", "expected '<document start>'"))
        or key is None
        or start is None
    ):
        return None
    beside = error.context_mark is not None and mark.column == error.context_mark.column
    if error.context == "while parsing a block collection" and beside:
        return _beside_list(key, mark, lines)
    outer = _key(lines, start)
    if "block mapping start" in problem and outer is not None and start != mark.line:
        at = _column(lines[start]) + 1
        return f"'{key}:' is indented differently from line {start + 1} ('{outer}:' begins in column {at}): align them"
    return None


def _next_line(lines: list[str], start: int, step: int) -> int | None:
    """Return the number of the nearest line from `start`, by steps of 1 or -1, that is not empty, a comment or `---`."""
    number = start
    while 0 <= number < len(lines):
        if lines[number].strip() and not lines[number].lstrip().startswith(("#", "---")):
            return number
        number += step
    return None


def _beside_list(key: str, mark: yaml.Mark, lines: list[str]) -> str:
    """Return a message on the right place for a key that is in the column of a list's dashes."""
    item = mark.line - 1
    while item > 0 and not lines[item][mark.column :].startswith("-"):
        item -= 1
    first, at = _key(lines, item), _column(lines[item])
    if key in _OF_A_MODEL and first is not None:
        return f"'{key}:' is next to the list; indent it under '- {first}:' ({at} spaces)"
    return f"'{key}:' is in the column of the list's dashes: begin it in the column of the list's own key"


def _second_colon(mark: yaml.Mark, lines: list[str], key: str | None) -> str:
    line = lines[mark.line]
    before = _next_line(lines, mark.line - 1, -1)
    outer = None if before is None else _key(lines, before)
    if key is not None and before is not None and outer is None and "- " not in lines[before]:
        return f"'{lines[before].strip()[:40]}' on line {before + 1} has no ':' after it"
    if (
        key is not None
        and line[: mark.column].strip("- ") == key
        and before is not None
        and outer is not None
    ):
        at = _column(lines[before])
        if _column(line) > at and not lines[before].rstrip().endswith(":"):
            return (
                f"'{key}:' is indented deeper than '{outer}:' on line {before + 1}, which has a value already: begin it in "
                f"column {at + 1}"
            )
    return (
        "a second ': ' in one line, mapping values are not allowed here: quote the text, or begin a new line"
    )


def _key(lines: list[str], number: int) -> str | None:
    """Return the key that a line begins with, after any dashes."""
    match = _KEY.match(lines[number][:200]) if number < len(lines) else None
    return match[1].strip()[:40] if match else None


def _column(line: str) -> int:
    """Return the column of a line's first key, after any dashes, counted from 0."""
    match = re.match(r"\s*(?:- +)*", line[:200])
    return match.end() if match else 0


def _excerpt(lines: list[str], mark: yaml.Mark) -> str:
    """Return the line in quotes, with a caret before the place."""
    line = lines[mark.line] if mark.line < len(lines) else ""
    if not line.strip() or mark.column > len(line):
        return ""
    start = max(0, mark.column - _EXCERPT // 2)
    before, after = line[start : mark.column], line[mark.column : start + _EXCERPT].rstrip()
    return f' (at ^ in "{before}^{after}")'
