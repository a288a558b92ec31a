"""report.html: one file without any reference to another, of what runs have left."""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import vl_convert

from wsss import __version__
from wsss.evaluation.protocol import TRUE_LABELS
from wsss.report.baseline import METHOD, Compared, compare_with_baseline
from wsss.report.charts import Chart, own_charts, shared_charts, variant_charts
from wsss.report.reading import Run, same_but_seed
from wsss.report.sweep import HEADINGS, Sweep, cells
from wsss.writing import palette

TITLES = {
    "val/map": "mAP of image labels",
    "val/cam_miou": "mIoU of CAMs",
    "val/cam_best_miou": "mIoU of CAMs, threshold chosen by masks",
    "val/aux_cam_miou": "mIoU of auxiliary CAMs",
    "val/miou": "mIoU of the segmentation",
    "val/multiscale_miou": "mIoU of the segmentation + scales",
    "val/crf_miou": "mIoU of the segmentation + CRF",
    "train/cam_miou": "mIoU of CAMs on training images",
    "train/cam_best_miou": "mIoU of CAMs on training images, threshold chosen by masks",
    "train/mask_miou": "mIoU of pseudo masks on training images",
}
"""The figures that stand in the first table, in its order."""


class Picture(NamedTuple):
    """A thumbnail.

    Attributes:
        title: what it shows of the image.
        content: of a WebP file.
        size: width and height in pixels.
        alt: the same in words, for those who do not see it.
    """

    title: str
    content: bytes
    size: tuple[int, int]
    alt: str


class Example(NamedTuple):
    """An image and what was made of it.

    Attributes:
        name: of the image.
        note: about it, perhaps empty.
        pictures: in the order of the slider.
        classes: (id, name) of those that any of the masks shows.
    """

    name: str
    note: str
    pictures: Sequence[Picture]
    classes: Sequence[tuple[int, str]]


class Difference(NamedTuple):
    """Of two runs in a figure, with an interval."""

    first: str
    second: str
    figure: str
    difference: float
    low: float
    high: float


class Seeds(NamedTuple):
    """Runs that differ in their seeds alone: by figure mean, standard deviation and number."""

    name: str
    seeds: Sequence[str]
    figures: Mapping[str, tuple[float, float, int]]


def page(
    title: str,
    runs: Sequence[Run],
    examples: Sequence[Example],
    about_examples: str,
    seeds: Sequence[Seeds],
    differences: Sequence[Difference],
    notes: Sequence[str],
    sweep: Sweep | None = None,
) -> str:
    """The whole file. What nobody has measured has no place in it."""
    charts = _Charts()
    sections: list[tuple[str, str, str]] = [("figures", "Figures", _overview(runs))]
    if compared := compare_with_baseline(runs):
        sections.append(("baseline", "Is training worth it?", _beside_baseline(compared)))
    if sweep is not None and sweep.is_summary:
        sections.insert(0, ("variants", "Variants of the sweep", _variants(sweep, charts)))
    if seeds:
        sections.append(("seeds", "Over seeds", _over_seeds(seeds)))
    if differences:
        sections.append(("differences", "Differences between runs", _differences(differences)))
    if examples:
        sections.append(("images", "Images", _gallery(examples, about_examples)))
    if shared := "".join(charts.figure(chart) for chart in shared_charts(runs)):
        sections.append(("charts", "Charts", f'<div class="charts">{shared}</div>'))
    sections.append(
        (
            "runs",
            "Each run" if len(runs) > 1 else "All figures",
            "".join(_run(run, charts, len(runs) == 1) for run in runs),
        )
    )
    sections.append(("cost", "Cost and versions", _cost(runs)))
    links = "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(heading)}</h2>{content}</section>'
        for key, heading, content in sections
    )
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    without = NOSCRIPT if charts.specs or examples else ""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{POLICY}'
        f"<style>{_beside('report.css')}</style></head>"
        f'<body><a class="skip" href="#main">Skip to the figures</a><header><h1>{escape(title)}</h1>'
        f"<p>{len(runs)} {'run' if len(runs) == 1 else 'runs'}, read by wsss {escape(__version__)}. What has not been "
        f"measured is not shown. This file refers to no other.</p>{said}{without}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main id="main">{body}</main>{charts.scripts()}'
        f"<script>{_beside('report.js')}</script></body></html>\n"
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


class _Charts:
    """The charts of a page, whose specifications stand at its end."""

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def figure(self, chart: Chart) -> str:
        number = len(self.specs)
        self.specs.append(chart.spec)
        table = _table(chart.title, chart.columns, chart.rows, hidden_caption=True)
        return (
            f'<figure class="chart"><figcaption><h3 id="chart{number}">{escape(chart.title)}</h3></figcaption>'
            f'<div class="vega" role="img" aria-labelledby="chart{number}" aria-describedby="about{number}"></div>'
            f'<p id="about{number}" class="note">{escape(chart.summary)}</p>'
            f"<details><summary>Numbers of this chart</summary>{table}</details></figure>"
        )

    def scripts(self) -> str:
        if not self.specs:
            return ""
        snippet = "window.vegaEmbed = vegaEmbed; window.vegaLite = vegaLite; window.vega = vega;"
        bundle = vl_convert.javascript_bundle(snippet).replace("</script", "<\\/script")
        return f'<script>{bundle}</script><script type="application/json" id="specs">{_json(self.specs)}</script>'


def _json(content: Any) -> str:
    """For an element script: nothing in it can end the element."""
    return json.dumps(content).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], hidden_caption: bool = False, raw: int = -1
) -> str:
    """A table that scrolls by itself; cells are text, but for a column `raw` of HTML. The first cell heads its row."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = []
    for row in rows:
        cells = [str(cell) if number == raw else escape(str(cell)) for number, cell in enumerate(row)]
        body.append(f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>')
    kind = ' class="hidden"' if hidden_caption else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption{kind}><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _overview(runs: Sequence[Run]) -> str:
    """Runs by the figures that stand for them, and what each of these was measured on.

    Of evaluations of one checkpoint there are differences too, which its protocols alone make.
    """
    keys = [key for key in TITLES if any(key in run.figures for run in runs)]
    if not keys:
        return "<p>No run has measured anything yet.</p>"
    rows = [
        [run.name + ("" if run.finished else " (unfinished)"), *(_number(run.figures.get(k)) for k in keys)]
        for run in runs
    ]
    firsts: dict[Path, Run] = {}
    for run in runs:
        if run.command == "eval" and run.checkpoint is not None:
            first = firsts.setdefault(run.checkpoint.resolve(), run)
            both = [key in first.figures and key in run.figures for key in keys]
            if first is not run and any(both):
                gaps = [
                    f"{run.figures[k] - first.figures[k]:+.4f}" if b else "" for k, b in zip(keys, both, strict=True)
                ]
                rows.append([f"{run.name} less {first.name}, the same checkpoint", *gaps])
    measured: list[tuple[Sequence[Any], Sequence[str] | None]] = []
    for key in keys:
        said: dict[tuple[str, ...], list[str]] = {}
        for run in runs:
            if key in run.figures:
                said.setdefault(tuple(run.notes.get(key, ["not stated"])), []).append(run.name)
        for note, names in said.items():
            which = "" if len(said) == 1 else f" ({', '.join(names)})"
            measured.append(([TITLES[key] + which], note))
    return (
        _table("Figures of each run", ["run", *(TITLES[key] for key in keys)], rows)
        + _tagged("The protocol that each figure was measured under", ["figure"], measured)
        + (GIVEN if any(TRUE_LABELS in part for _, note in measured for part in note or ()) else "")
    )


def _shared(notes: Sequence[Sequence[str]]) -> list[str]:
    """Parts that all of them have."""
    return [part for part in notes[0] if all(part in note for note in notes)] if len(notes) > 1 else []


def _tagged(caption: str, columns: Sequence[str], rows: Sequence[tuple[Sequence[Any], Sequence[str] | None]]) -> str:
    """A table whose last column is of protocols, where there are any; what all of these share stands above it."""
    shared = _shared([note for _, note in rows if note is not None])
    above = f'<div class="note">Every figure with a protocol: {_tags(shared)}</div>' if shared else ""
    full = [[*cells, _tags([tag for tag in note or () if tag not in shared])] for cells, note in rows]
    return above + _table(caption, [*columns, "measured on"], full, raw=len(columns))


def _tags(parts: Sequence[str]) -> str:
    """Parts of a protocol; true image labels stand out, in words too."""
    shown = [
        f'<li class="true">⚠ {escape(part)}</li>' if TRUE_LABELS in part else f"<li>{escape(part)}</li>"
        for part in parts
    ]
    return f'<ul class="tags">{"".join(shown)}</ul>' if shown else ""


def _beside_baseline(compared: Sequence[Compared]) -> str:
    rows = []
    for run, figure, more in compared:
        value = run.figures[figure]
        beside = "measured in another way" if more is None else f"{more:+.4f}"
        beside = "no training" if run.method == METHOD else beside
        rows.append(([run.name, TITLES[figure], _number(value), beside], run.notes.get(figure)))
    said = (
        "<p>CLIP-ES learns nothing here: its maps come from CLIP, which has seen pictures with captions, and the names "
        "of the classes. What does not exceed it is not worth its training.</p>"
    )
    return said + _tagged("Runs beside what CLIP finds without training", ["run", "figure", "value", "more"], rows)


def _over_seeds(seeds: Sequence[Seeds]) -> str:
    keys = [key for key in TITLES if any(key in group.figures for group in seeds)]
    rows = []
    for group in seeds:
        cells = (group.figures.get(key) for key in keys)
        shown = [f"{c[0]:.4f} ± {c[1]:.4f}" if c and c[2] > 1 else _number(c[0] if c else None) for c in cells]
        rows.append([group.name, ", ".join(group.seeds), *shown])
    return _table(
        "Mean and standard deviation (of the sample) of runs that differ in their seeds alone",
        ["runs", "seeds", *(TITLES[key] for key in keys)],
        rows,
    )


def _differences(differences: Sequence[Difference]) -> str:
    rows = [
        [
            f"{d.second} less {d.first}",
            d.figure,
            f"{d.difference:+.4f}",
            f"{d.low:+.4f} to {d.high:+.4f}",
            "no" if d.low <= 0 <= d.high else "yes",
        ]
        for d in differences
    ]
    caption = (
        "Paired bootstrap over the images (1,000 resamples): how certain a difference is, as far as the choice of "
        "images goes; what other seeds would change is not in it"
    )
    return _table(caption, ["runs", "figure", "difference", "95 % of resamples", "0 outside"], rows)


def _variants(sweep: Sweep, charts: _Charts) -> str:
    caption = (
        f"Mean and standard deviation (of the sample) over the jobs of each variant, and the mean difference from the "
        f"first, {sweep.baseline}, in pairs of jobs with one seed. Intervals of 95 %: Student's over the pairs, as far "
        "as seeds go; a bootstrap over the images, as far as their choice goes, where each image was counted"
    )
    shown = "".join(charts.figure(chart) for chart in variant_charts(sweep.values()))
    return _table(caption, HEADINGS, map(cells, sweep.rows)) + f'<div class="charts">{shown}</div>'


def picture_of(sweep: Sweep) -> bytes:
    """A PNG of the charts of a sweep's variants."""
    charts = list(variant_charts(sweep.values()))
    alone = ("config", "autosize", "background")  # of a chart that stands by itself
    parts = [
        {key: value for key, value in chart.spec.items() if key not in alone} | {"width": 360, "title": chart.title}
        for chart in charts
    ]
    spec = {"concat": parts, "columns": 2, "background": "white", "config": charts[0].spec["config"]}
    return vl_convert.vegalite_to_png(spec, scale=2)


def _gallery(examples: Sequence[Example], about: str) -> str:
    """A card for each image, with a slider between its pictures; without scripts the pictures stand side by side."""
    most = max(len(example.pictures) for example in examples)
    all_at_once = (
        '<div class="slider all"><label for="all">All images: </label>'
        f'<input type="range" id="all" min="0" max="{most - 1}" value="0" step="1"></div>'
    )
    cards = []
    for number, example in enumerate(examples):
        views = "".join(
            f'<figure><img alt="{escape(picture.alt)}" width="{picture.size[0]}" height="{picture.size[1]}" '
            f'src="data:image/webp;base64,{base64.b64encode(picture.content).decode()}">'
            f"<figcaption>{escape(picture.title)}</figcaption></figure>"
            for picture in example.pictures
        )
        legend = "".join(
            f'<li><span class="swatch{" hatched" if c == 255 else ""}" style="background-color:{_colour_of(c)}" '
            f'aria-hidden="true"></span>{"" if c == 255 else f"{c} "}{escape(name)}</li>'
            for c, name in example.classes
        )
        note = f'<p class="note">{escape(example.note)}</p>' if example.note else ""
        cards.append(
            f'<article class="card" aria-labelledby="image{number}">'
            f'<h3 id="image{number}">{escape(example.name)}</h3>{note}'
            f'<div class="slider"><label for="view{number}">Picture: <output for="view{number}"></output></label>'
            f'<input type="range" id="view{number}" min="0" max="{len(example.pictures) - 1}" value="0" step="1"></div>'
            f'<div class="views">{views}</div>'
            f'<ul class="legend" aria-label="Classes in the masks">{legend}</ul></article>'
        )
    return f'<p>{escape(about)}</p>{all_at_once}<div class="cards">{"".join(cards)}</div>'


def _colour_of(number: int) -> str:
    return "#ffffff" if number == 255 else "#{:02x}{:02x}{:02x}".format(*palette()[number])


def _run(run: Run, charts: _Charts, alone: bool) -> str:
    """All figures of a run but those of single classes, its own charts, and its settings."""
    keys = [key for key in run.figures if "iou/" not in key]
    rows = [([key, _number(run.figures[key])], run.notes.get(key)) for key in keys]
    figures = _tagged(f"All figures of {run.name}", ["figure", "value"], rows) if rows else ""
    if not alone and rows:
        figures = f"<details><summary>All {len(rows)} figures</summary>{figures}</details>"
    own = "".join(charts.figure(chart) for chart in own_charts(run))
    settings = _table(
        f"Settings of {run.name}", ["setting", "value"], [[key, json.dumps(v)] for key, v in run.settings.items()]
    )
    shown = f"<details><summary>Settings</summary>{settings}</details>" if run.settings else ""
    heading = f"{run.name}{'' if run.finished else ', unfinished'}"
    return (
        f'<article class="run"><h3>{escape(heading)}</h3><p class="note">{escape(str(run.folder))}</p>{figures}{shown}'
        f'<div class="charts">{own}</div></article>'
    )


def _cost(runs: Sequence[Run]) -> str:
    rows = [
        [run.name, _duration(run.seconds), _number(run.memory, 0), _number(run.figures.get("steps"), 0)]
        for run in runs
        if run.seconds is not None or run.memory is not None
    ]
    cost = _table("What each run took", ["run", "time", "peak memory in MiB", "steps"], rows) if rows else ""
    names = list(dict.fromkeys(key for run in runs for key in run.versions))
    columns: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        columns.setdefault(tuple(run.versions.get(name, "") for name in names), []).append(run.name)
    groups = ["all runs"] if len(columns) == 1 else [", ".join(group) for group in columns.values()]
    versions = [[group, *values] for group, values in zip(groups, columns, strict=True)]
    return cost + (_table("Versions and machines", ["runs", *names], versions) if names else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if digits == 0 or (value.is_integer() and abs(value) > 1) else f"{value:.{digits}f}"


def seeds_of(runs: Sequence[Run], measure: Any) -> list[Seeds]:
    """Groups of at least two runs that differ in their seeds alone; nothing where there is no such group.

    `measure` is given the metrics.json of a group, as `wsss.evaluation.comparison.over_seeds`.
    """
    groups = [
        [run for run in group if run.finished and (run.folder / "metrics.json").is_file()]
        for group in same_but_seed(runs)
    ]
    found = []
    for group in groups:
        if len(group) > 1:
            name = group[0].name if len(groups) > 1 else group[0].method
            figures = measure([run.folder / "metrics.json" for run in group])
            found.append(Seeds(_without_seed(name), [str(run.seed) for run in group], figures))
    return found


def _without_seed(name: str) -> str:
    return ", ".join(part for part in name.split(", ") if not part.startswith("seed="))


GIVEN = f'<p class="note">⚠ {TRUE_LABELS}: which classes an image shows was given, not predicted.</p>'

NOSCRIPT = (
    '<noscript><p class="note">Without scripts the pictures of an image stand side by side, and of each chart there '
    "are its numbers.</p></noscript>"
)

POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'\">"
)
"""Nothing may be loaded; Vega compiles its expressions."""
