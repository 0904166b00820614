"""Draw an asciicast as one SVG that moves by itself: no script, no font of its own, for <img> in a README.

What cannot move shows the last screen. The screens are laid under each other as on a film, which one animation of CSS pulls through the window; a line that
several screens show is drawn once. Characters of bars are rectangles, since fonts draw them with gaps.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from html import escape

import pyte

FRAME_SECONDS = 0.12
"""A screen stays at least so long; what comes and goes faster is not drawn."""
LONGEST_REST = 3.0
"""Nothing on the screen rests longer, in seconds."""
LAST_REST = 6.0
KEY_REST = 1.6
"""So long a key that was pressed is shown, in seconds."""
SIZE, WIDTH, HEIGHT = 14, 8.4, 19
"""The size of a character in pixels: the font's, and the cell's."""
MARGIN, TITLE = 16, 34
BACKGROUND, BORDER, DEFAULT = "#0d1117", "#3d444d", "#e6edf3"
COLOURS = {
    "black": "#6e7681",
    "red": "#ff7b72",
    "green": "#3fb950",
    "brown": "#d29922",
    "blue": "#58a6ff",
    "magenta": "#bc8cff",
    "cyan": "#39c5cf",
    "white": "#b1bac4",
}
BARS = {"━": (0.0, 1.0), "╸": (0.0, 0.5), "╺": (0.5, 1.0)}
"""Where in its cell a bar begins and ends."""


@dataclass(frozen=True)
class Run:
    """Neighbouring characters of one look."""

    column: int
    text: str
    colour: str
    bold: bool


Line = tuple[Run, ...]
Screen = tuple[Line, ...]


def colour_of(name: str) -> str:
    """Return the colour of what pyte calls it: a name, or six digits."""
    if name == "default":
        return DEFAULT
    plain = name.removeprefix("bright")
    return COLOURS.get(plain, f"#{name}")


def line_of(row: dict[int, pyte.screens.Char], width: int) -> Line:
    """Cut a row of the screen into runs; what is blank at its end is left out."""
    cells = [row[i] for i in range(width)]
    looks = [(colour_of(c.fg), c.bold, c.data in BARS) for c in cells]
    runs, column = [], 0
    for (colour, bold, _), group in itertools.groupby(zip(looks, cells, strict=True), lambda x: x[0]):
        text = "".join(cell.data for _, cell in group)
        if text.strip():
            start = len(text) - len(text.lstrip())
            runs.append(Run(column + start, text.strip(), colour, bold))
        column += len(text)
    return tuple(runs)


@dataclass
class Film:
    """A recording, played."""

    columns: int
    rows: int
    """That are ever used."""
    shown: list[tuple[float, Screen]]
    """Each screen, and the seconds that it stays."""
    keys: list[float]
    """When Ctrl-C was pressed, in seconds of the film."""


def play(cast: str) -> Film:
    """Play a recording."""
    header, *events = (json.loads(line) for line in cast.splitlines())
    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    shown: list[tuple[float, Screen]] = []
    keys: list[float] = []
    rests = [min(until - at, LONGEST_REST) for (at, *_), (until, *_) in itertools.pairwise(events)]
    for (_, kind, text), rest in zip(events, [*rests, LAST_REST], strict=True):
        if kind == "i":
            keys.append(sum(rest for rest, _ in shown))
        else:
            stream.feed(text)
        now = tuple(line_of(screen.buffer[y], screen.columns) for y in range(screen.lines))
        if shown and (shown[-1][1] == now or shown[-1][0] < FRAME_SECONDS):
            shown[-1] = (shown[-1][0] + rest, now)
        else:
            shown.append((rest, now))
    used = max(y for _, seen in shown for y, line in enumerate(seen) if line) + 1
    return Film(screen.columns, used, [(rest, seen[:used]) for rest, seen in shown], keys)


def drawn(line: Line) -> str:
    """Return a line as SVG, its baseline at 0."""
    parts = []
    for run in line:
        x = run.column * WIDTH
        if run.text[0] in BARS:
            ends = [(i + BARS[c][0], i + BARS[c][1]) for i, c in enumerate(run.text)]
            left, right = x + ends[0][0] * WIDTH, x + ends[-1][1] * WIDTH
            parts.append(
                f'<rect x="{left:.1f}" y="-6.5" width="{right - left:.1f}" height="3.5" fill="{run.colour}"/>'
            )
            continue
        look = "" if run.colour == DEFAULT else f' fill="{run.colour}"'
        look += ' font-weight="700"' if run.bold else ""
        # Fonts of other widths are spread to the cells.
        length = f' textLength="{len(run.text) * WIDTH:.1f}"' if len(run.text) > 1 else ""
        parts.append(f'<text x="{x:.1f}"{length}{look}>{escape(run.text, quote=False)}</text>')
    return "".join(parts)


def draw(cast: str) -> str:
    """Return a recording as an animated SVG."""
    played = play(cast)
    columns, rows, shown = played.columns, played.rows, played.shown
    total = sum(rest for rest, _ in shown)
    inner_width, inner_height = columns * WIDTH, rows * HEIGHT + 6
    width, height = inner_width + 2 * MARGIN, inner_height + TITLE + MARGIN
    numbers: dict[Line, int] = {}
    film, moves, at = [], [], 0.0
    for i, (rest, seen) in enumerate(shown):
        top = i * inner_height
        for y, line in enumerate(seen):
            if line:
                number = numbers.setdefault(line, len(numbers))
                film.append(f'<use href="#l{number}" y="{top + (y + 1) * HEIGHT - 5:g}"/>')
        moves.append(f"{100 * at / total:.3f}%{{transform:translateY(-{top:g}px)}}")
        at += rest
    last = (len(shown) - 1) * inner_height
    lines = "".join(f'<g id="l{number}">{drawn(line)}</g>' for line, number in numbers.items())
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="18" r="5.5" fill="{colour}"/>'
        for i, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    pressed = "".join(
        f"{100 * at / total:.3f}%{{opacity:1}}{100 * (at + KEY_REST) / total:.3f}%{{opacity:0}}"
        for at in played.keys
    )
    key = (
        f'<g id="key" transform="translate({width - 118:g} {height - 58:g})"><rect width="94" height="36" rx="7" '
        f'fill="#f0f6fc"/><text x="47" y="23" text-anchor="middle" font-weight="700" fill="{BACKGROUND}">'
        "Ctrl-C</text></g>"
    )
    style = (
        f"text{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',"
        f"monospace;font-size:{SIZE}px;white-space:pre}}"
        f"#film{{transform:translateY(-{last:g}px);animation:film {total:.2f}s step-end infinite}}"
        f"@keyframes film{{{''.join(moves)}}}"
        f"#key{{opacity:0;animation:key {total:.2f}s step-end infinite}}@keyframes key{{0%{{opacity:0}}{pressed}}}"
        f"@media(prefers-reduced-motion:reduce){{#key{{animation:none}}#film{{animation:none}}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="A merge is stopped with Ctrl-C and resumed">\n'
        f"<style>{style}</style>\n<defs>{lines}</defs>\n"
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="9" fill="{BACKGROUND}" '
        f'stroke="{BORDER}"/>{dots}\n'
        f'<svg x="{MARGIN}" y="{TITLE}" width="{inner_width:g}" height="{inner_height:g}"><g id="film" fill="{DEFAULT}">'
        f"{''.join(film)}</g></svg>\n{key}\n</svg>\n"
    )
