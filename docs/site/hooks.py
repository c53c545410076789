"""What MkDocs does with a page: tables from the results, the figure of the front page, and formulas as pictures.

Formulas are drawn when the site is built. So they look alike in every browser, and need no script, font or network.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import ziamath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tables

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
EM = 20.0
"""The size in which formulas are drawn. The page scales them."""
ziamath.config.svg2 = False  # every formula has its own outlines; names of shared ones would clash within a page
FIGURE = "<!-- figure: reliability -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figure of the calibration experiment, which lies beside its results."""
    figure = tables.RESULTS / "calibration.png"
    files.append(File.generated(config, figure.name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables and the figure of a page."""
    return tables.fill(markdown.replace(FIGURE, reliability()) if FIGURE in markdown else markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Draw the formulas of a page."""

    def drawn(formula: re.Match[str]) -> str:
        text = html.unescape(formula[2]).strip()
        if formula[1] == "div":
            parts = [_formula(part, inline=False) for part in re.split(r"\\q?quad", text)]
            return f'<div class="formula">{" ".join(parts)}</div>'
        return _formula(text, inline=True)

    return FORMULA.sub(drawn, content)


def _formula(text: str, *, inline: bool) -> str:
    """Return a formula in LaTeX as SVG, in units of the text's size and in its colour."""
    made = ziamath.Latex(text, size=EM, color="currentColor", inline=inline)
    width, height = made.getsize()
    style = f"width: {width / EM:.3f}em; height: {height / EM:.3f}em; vertical-align: {made.getyofst() / EM:.3f}em"
    drawing = re.sub(r' (width|height)="[^"]*"', "", made.svg(), count=2)
    label = html.escape(text, quote=True)
    return drawing.replace("<svg ", f'<svg class="math" role="img" aria-label="{label}" style="{style}" ', 1)


# ---- the figure of the front page ----

SIDE, LEFT, TOP = 250.0, 62.0, 14.0
LOW = 0.4
"""The confidence at which the axes start. The top label of a voxel is seldom less probable."""
CURVES = (("dice_cross_entropy", "Dice + cross-entropy", "usual"), ("calseg", "CALSeg", "ours"))
LEAST_SHARE = 0.002
"""Bins with a smaller share of the voxels are noise, and not drawn."""


def _place(confidence: float, accuracy: float) -> str:
    """Return the coordinates of a point of the diagram."""
    scale = SIDE / (1 - LOW)
    return f"{LEFT + (confidence - LOW) * scale:.1f},{TOP + (1 - accuracy) * scale:.1f}"


def _points(curve: dict[str, Any]) -> str:
    """Return the points of a curve, from its bins with enough voxels."""
    total = sum(curve["voxels"])
    return " ".join(
        _place(confidence, accuracy)
        for voxels, confidence, accuracy in zip(curve["voxels"], curve["confidence"], curve["accuracy"], strict=True)
        if voxels >= LEAST_SHARE * total and confidence >= LOW and accuracy >= LOW
    )


def reliability() -> str:
    """Return the reliability diagram near the simulated lesions, as SVG. It has the colours of the page."""
    test = tables.load("calibration-synthetic.json")["test"]
    end, bottom = LEFT + SIDE, TOP + SIDE
    parts = [
        f'<svg class="reliability" viewBox="0 0 {end + 26:.0f} {bottom + 48:.0f}" role="img"'
        ' aria-label="How often a voxel is right, over how sure the network is of it">',
        f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" class="frame"/>',
        f'<polyline points="{_place(LOW, LOW)} {_place(1, 1)}" class="perfect"/>',
    ]
    for tenth in range(4, 11, 2):
        x, _, _ = _place(tenth / 10, LOW).partition(",")
        _, _, y = _place(LOW, tenth / 10).partition(",")
        parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{10 * tenth} %</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4}" text-anchor="end">{10 * tenth} %</text>')
    for number, (method, title, style) in enumerate(CURVES):
        parts.append(f'<polyline points="{_points(test[method]["near_curve"])}" class="{style}"/>')
        y = TOP + 22 + 20 * number
        parts.append(f'<line x1="{LEFT + 12}" x2="{LEFT + 36}" y1="{y}" y2="{y}" class="{style}"/>')
        parts.append(f'<text x="{LEFT + 42}" y="{y + 4}">{title}</text>')
    parts.append(f'<text x="{LEFT + SIDE / 2}" y="{bottom + 40}" text-anchor="middle">how sure the network is</text>')
    middle = TOP + SIDE / 2
    parts.append(
        f'<text x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})">'
        "how often it is right</text>"
    )
    return "".join([*parts, "</svg>"])
