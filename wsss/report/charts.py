"""Charts of figures that runs have left, as Vega-Lite specifications, each with its numbers and a sentence."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt

from wsss.report.reading import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000", "#7a5195")
"""Those of Okabe and Ito, which people see apart whatever colours they see; yellow, faint on white, is darker."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 1], [1, 3], [10, 2, 2, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
MOST_POINTS = 300
"""Of a line of a log; more are thinned out evenly."""

MOST_TICKS = 12
"""Of an axis; with no more places than this all of them are named."""

FEW_POINTS = 30
"""Of a line whose points are drawn."""

MOST_CLASSES = 60
"""Rows of a chart by class; of more those with the lowest and the highest values stand there."""

MOST_PAIRS = 40
"""Cells of a chart of confused classes."""


class Chart(NamedTuple):
    """A chart.

    Attributes:
        title: for people.
        summary: what it shows, for those who do not see it.
        spec: of Vega-Lite, without a width: it takes that of the page.
        columns: headings of its numbers.
        rows: its numbers.
    """

    title: str
    summary: str
    spec: dict[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def shared_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Those in which all runs stand together, each where it has been measured."""
    yield from _threshold_curves(runs)
    yield from _by_class(runs)
    yield from _by_size(runs)
    yield from _over_smoothing(runs)
    yield from _losses(runs)
    yield from _figures_by_step(runs)


def variant_charts(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[Chart]:
    """By figure, variant and repetition a value: a point for each, mean and standard deviation as an upright and a bar.

    One chart for each figure.
    """
    for figure, variants in values.items():
        points = [
            {"variant": name, "job": job, "value": value}
            for name, jobs in variants.items()
            for job, value in jobs.items()
        ]
        means: list[dict[str, Any]] = []
        for name, jobs in variants.items():
            mean = statistics.fmean(jobs.values())
            spread = statistics.stdev(jobs.values()) if len(jobs) > 1 else 0.0
            means.append({"variant": name, "mean": mean, "low": mean - spread, "high": mean + spread})
        y = alt.Y("variant:N", sort=list(variants), title=None, axis=alt.Axis(labelLimit=220))
        scale = alt.Scale(zero=False)
        plain: Any = alt.Chart(alt.Data(values=means))
        bar = plain.mark_rule(size=2).encode(
            x=alt.X("low:Q", title=figure, scale=scale, axis=alt.Axis(tickCount=5)), x2="high:Q", y=y
        )
        upright = plain.mark_tick(thickness=3, size=16).encode(x=alt.X("mean:Q", scale=scale), y=y)
        tips = ["variant:N", "job:N", alt.Tooltip("value:Q", format=".4f")]
        dots: Any = alt.Chart(alt.Data(values=points)).mark_point(filled=True, size=45, opacity=0.6)
        dots = dots.encode(x=alt.X("value:Q", scale=scale), y=y, color=alt.value(COLOURS[0]), tooltip=tips)
        low, high = min(means, key=lambda one: one["mean"]), max(means, key=lambda one: one["mean"])
        told = f"{_mean_of('lowest', low)}, {_mean_of('highest', high)}"
        said = f"A point for each job, an upright at the mean, a bar of one standard deviation to both sides; {told}."
        shown = [[point["variant"], point["job"], f"{point['value']:.4f}"] for point in points]
        spec = _spec((bar + upright + dots).properties(height=24 * len(variants)))
        yield Chart(f"{figure} of the variants", said, spec, ("variant", "job", figure), shown)


def _mean_of(what: str, mean: Mapping[str, Any]) -> str:
    return f"the {what} mean is that of {mean['variant']}, {mean['mean']:.4f}"


def own_charts(run: Run) -> Iterator[Chart]:
    """Those of one run: precision and recall, and what is taken for what."""
    for metric, table in run.tables.items():
        rows = [
            {"class": name, "value": values[kind], "run": kind}
            for kind in ("precision", "recall")
            for name, values in table.get("classes", {}).items()
            if values.get(kind) is not None
        ]
        if rows:
            title = f"Precision and recall of {_words(metric)}"
            yield _dots(title, rows, "precision and recall", "measure", list(table["classes"]))
    for metric, table in run.tables.items():
        if pairs := table.get("confused"):
            unit = "share" if all(0 < value <= 1 for *_, value in pairs) else "pixels"
            yield _confusion(f"Classes taken for others, {_words(metric)}", pairs, unit)


def _threshold_curves(runs: Sequence[Run]) -> Iterator[Chart]:
    for metric in _metrics(runs, "curve"):
        lines = {
            run.name: [
                (threshold, value)
                for threshold, value in zip(run.tables[metric]["thresholds"], run.tables[metric]["curve"], strict=True)
                if value is not None
            ]
            for run in runs
            if "curve" in run.tables.get(metric, {})
        }
        fixed = {}
        for run in runs:
            known = run.settings.get("method.background_threshold")
            if run.name in lines and isinstance(known, int | float) and known >= 0:
                fixed[run.name] = min(lines[run.name], key=lambda point: abs(point[0] - known))
        said = "The masks would choose the highest point; a protocol without masks may not."
        said += " A diamond marks the threshold that was fixed beforehand." if fixed else ""
        title = f"Mean IoU of {_words(metric)} by background threshold"
        yield _lines(title, lines, ("threshold", "mean IoU"), said, fixed)


def _by_class(runs: Sequence[Run]) -> Iterator[Chart]:
    for heading, prefix in (("segmentation", "val/iou/"), ("pseudo masks", "train/iou/")):
        rows = [
            {"class": key.removeprefix(prefix), "value": value, "run": run.name}
            for run in runs
            for key, value in run.figures.items()
            if key.startswith(prefix)
        ]
        if rows:
            yield _dots(f"IoU of {heading} by class", rows, "IoU", "run")
    for metric in (name for name in _metrics(runs, "classes") if name.endswith("cam_miou")):
        rows = [
            {"class": name, "value": values["iou"], "run": run.name}
            for run in runs
            for name, values in run.tables.get(metric, {}).get("classes", {}).items()
            if values.get("iou") is not None
        ]
        if rows:
            yield _dots(f"IoU of {_words(metric)} at the fixed threshold by class", rows, "IoU", "run")


def _by_size(runs: Sequence[Run]) -> Iterator[Chart]:
    sizes = ("small", "medium", "large")
    keys = [key for run in runs for key in run.figures]
    for prefix in dict.fromkeys(
        found[1] for key in keys if (found := re.fullmatch(r"(.*)(small|medium|large)_miou", key))
    ):
        rows = [
            {"class": size, "value": run.figures[f"{prefix}{size}_miou"], "run": run.name}
            for size in sizes
            for run in runs
            if f"{prefix}{size}_miou" in run.figures
        ]
        if rows:
            chart = _dots(
                f"Mean IoU by the size of objects, {_words(prefix.rpartition('/')[2])}", rows, "mean IoU", "run"
            )
            said = "Small is less than 1 % of the image, medium 1 to 10 %, large more."
            yield chart._replace(summary=f"{said} {chart.summary}", columns=("run", "size", "mean IoU"))


def _over_smoothing(runs: Sequence[Run]) -> Iterator[Chart]:
    lines = {
        run.name: [
            (float(block), value) for block, value in enumerate(run.tables["over_smoothing"]["blocks"], 1) if value
        ]
        for run in runs
        if "over_smoothing" in run.tables
    }
    if lines:
        said = "Near 1 all tokens of an image are the same, and so are all places of a map made of them."
        yield _lines("Over-smoothing: mean cosine of patch tokens", lines, ("block", "mean cosine"), said)


def _losses(runs: Sequence[Run]) -> Iterator[Chart]:
    logged = [run for run in runs if any(key.startswith("train/loss") for key in run.log)]
    if len(logged) == 1:
        run = logged[0]
        lines = {
            key.removeprefix("train/loss_").replace("train/loss", "weighted sum"): values
            for key, values in run.log.items()
            if key.startswith("train/loss")
        }
    else:
        lines = {run.name: run.log["train/loss"] for run in logged if "train/loss" in run.log}
    if lines:
        yield _lines("Losses of the training", lines, ("step", "loss"), "Of single batches, as they were logged.")


def _figures_by_step(runs: Sequence[Run]) -> Iterator[Chart]:
    known = {"val/map": "mAP", "val/cam_miou": "Mean IoU of CAMs", "val/miou": "Mean IoU of the segmentation"}
    for key, title in known.items():
        lines = {run.name: run.log[key] for run in runs if len(run.log.get(key, ())) > 1}
        if lines:
            yield _lines(f"{title} by step", lines, ("step", title[0].lower() + title[1:]), "At each evaluation.")


def _lines(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    axes: tuple[str, str],
    said: str,
    marked: Mapping[str, tuple[float, float]] | None = None,
) -> Chart:
    """One line for each name, told apart by colour, and by dashes or, where they are few, the shape of its points."""
    rows: list[dict[str, Any]] = [
        {"run": name, "x": x, "y": y} for name, points in lines.items() for x, y in _thinned(points)
    ]
    few, whole = max(map(len, lines.values())) <= FEW_POINTS, all(row["x"].is_integer() for row in rows)
    steps = sorted({row["x"] for row in rows})
    axis = alt.Axis(values=steps if len(steps) <= MOST_TICKS else alt.Undefined, format="d" if whole else alt.Undefined)
    places = {
        "x": alt.X("x:Q", title=axes[0], axis=axis, scale=alt.Scale(nice=not whole, zero=False)),
        "y": alt.Y("y:Q", title=axes[1], scale=alt.Scale(zero=False)),
    }
    tips = ["run:N", alt.Tooltip("x:Q", title=axes[0]), alt.Tooltip("y:Q", title=axes[1], format=".4f")]
    chart: Any = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point={"filled": True, "size": 60} if few else False)
        .encode(**places, color=_colour(rows), tooltip=tips)
    )
    if few:
        chart = chart.encode(shape=_shape(rows))
    else:
        dash = alt.StrokeDash("run:N", sort=None, title=None, scale=_scale(rows, DASHES), legend=_legend(rows))
        chart = chart.encode(strokeDash=dash)
    if marked:
        values = [{"run": name, "x": x, "y": y} for name, (x, y) in marked.items()]
        mark = alt.Chart(alt.Data(values=values)).mark_point(shape="diamond", size=140, filled=True, stroke="#000")
        chart = chart + mark.encode(**places, color=_colour(rows), tooltip=tips)
    ends = []
    for name, points in lines.items():
        best = max(points, key=lambda point: point[1])
        told = f"{name} has its highest value {best[1]:.4g} at {axes[0]} {best[0]:g} and ends at {points[-1][1]:.4g}"
        ends.append(told + (f", fixed {marked[name][0]:g}: {marked[name][1]:.4g}" if marked and name in marked else ""))
    shown = [[row["run"], f"{row['x']:g}", f"{row['y']:.4f}"] for row in rows]
    return Chart(title, f"{said} {'; '.join(ends)}.", _spec(chart.properties(height=260)), ("line", *axes), shown)


def _dots(
    title: str, rows: Sequence[dict[str, Any]], axis: str, series: str, classes: Sequence[str] | None = None
) -> Chart:
    """A bar for each class, or of several series points, told apart by colour and shape."""
    known = dict.fromkeys(row["class"] for row in rows)
    classes = [name for name in classes or known if name in known]
    said = ""
    if len(classes) > MOST_CLASSES:
        means = dict.fromkeys(classes, 0.0)
        for row in rows:
            means[row["class"]] += row["value"]
        ranked = sorted(classes, key=lambda name: means[name])
        kept = {*ranked[: MOST_CLASSES // 2], *ranked[-(MOST_CLASSES // 2) :]}
        said = f" Of {len(classes)} classes those with the lowest and the highest values."
        classes = [name for name in classes if name in kept]
        rows = [row for row in rows if row["class"] in kept]
    plain: Any = alt.Chart(alt.Data(values=list(rows)))
    several = len(_names(rows)) > 1
    chart = plain.mark_point(filled=True, size=70, opacity=0.9) if several else plain.mark_bar(size=12)
    chart = chart.encode(
        x=alt.X("value:Q", title=axis, scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("class:N", sort=classes, title=None, axis=alt.Axis(grid=True, labelLimit=120)),
        color=_colour(rows),
        tooltip=["run:N", "class:N", alt.Tooltip("value:Q", format=".4f")],
    ).properties(height=20 * len(classes))
    if several:
        chart = chart.encode(shape=_shape(rows))
    low = min(rows, key=lambda row: row["value"])
    high = max(rows, key=lambda row: row["value"])
    summary = (
        f"From {low['class']} with {low['value']:.4f} ({low['run']}) to {high['class']} with {high['value']:.4f} "
        f"({high['run']}).{said}"
    )
    shown = [[row["run"], row["class"], f"{row['value']:.4f}"] for row in rows]
    return Chart(title, summary, _spec(chart), (series, "class", axis), shown)


def _confusion(title: str, pairs: Sequence[Sequence[Any]], unit: str) -> Chart:
    """Cells of the most frequent confusions, darker for more."""
    rows = [{"true": true, "predicted": found, "value": value} for true, found, value in pairs[:MOST_PAIRS]]
    order = list(dict.fromkeys(name for row in rows for name in (row["true"], row["predicted"])))
    number = ".2f" if unit == "share" else ",d"
    cells = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(stroke="white")
        .encode(
            x=alt.X("predicted:N", sort=order, title="predicted", axis=alt.Axis(labelAngle=-60, labelLimit=90)),
            y=alt.Y("true:N", sort=order, title="true", axis=alt.Axis(labelLimit=100)),
            color=alt.Color("value:Q", title=unit, scale=alt.Scale(scheme="blues", domainMin=0)),
            tooltip=["true:N", "predicted:N", alt.Tooltip("value:Q", title=unit, format=number)],
        )
        .properties(height=24 * len({row["true"] for row in rows}))
    )
    true, found, value = pairs[0]
    told = f"{value:.2f} of its pixels" if unit == "share" else f"{value:,} pixels"
    summary = f"Most often {true} is predicted as {found}: {told}. The {len(rows)} most frequent pairs."
    shown = [[row["true"], row["predicted"], format(row["value"], number)] for row in rows]
    return Chart(title, summary, _spec(cells), ("true", "predicted", unit), shown)


def _metrics(runs: Sequence[Run], key: str) -> list[str]:
    """Metrics whose tables hold this in any run."""
    return list(dict.fromkeys(name for run in runs for name, table in run.tables.items() if key in table))


def _words(metric: str) -> str:
    """What the name of a metric speaks of."""
    kinds = {"aux_cam_": "auxiliary CAMs", "cam_": "CAMs", "multiscale_": "the segmentation at several scales"}
    kinds |= {"crf_": "the segmentation after the CRF"}
    of, rest = next(
        ((word, metric[len(start) :]) for start, word in kinds.items() if metric.startswith(start)), ("", metric)
    )
    of = of or "the segmentation"
    near = {"boundary_miou": " near contours", "trimap_miou": " near true contours"}
    near |= {"cooccurrence": " in the same image"}
    return f"{of}{near.get(rest, '')}"


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["run"] for row in rows))


def _scale(rows: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> alt.Scale:
    names = _names(rows)
    return alt.Scale(domain=names, range=[values[number % len(values)] for number in range(len(names))])


def _colour(rows: Sequence[Mapping[str, Any]]) -> alt.Color:
    """A colour for each series."""
    return alt.Color("run:N", sort=None, title=None, scale=_scale(rows, COLOURS), legend=_legend(rows))


def _shape(rows: Sequence[Mapping[str, Any]]) -> alt.Shape:
    """That of the points of each series."""
    return alt.Shape("run:N", sort=None, title=None, scale=_scale(rows, SHAPES), legend=_legend(rows))


def _legend(rows: Sequence[Mapping[str, Any]]) -> alt.Legend | None:
    """One where there are several series; those of colours, dashes and shapes become one."""
    several = len(_names(rows)) > 1
    return alt.Legend(orient="bottom", columns=1, labelLimit=300, symbolLimit=50, symbolSize=120) if several else None


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = -(-len(points) // MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _spec(chart: Any) -> dict[str, Any]:
    font = {"labelFontSize": 12, "titleFontSize": 12, "labelColor": "#222", "titleColor": "#222"}
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = (
        chart.properties(width="container", background="white", autosize=fit)
        .configure_axis(**font)
        .configure_legend(**font)
    )
    spec: dict[str, Any] = chart.to_dict()
    del spec["$schema"]  # an address that nothing has to load
    return spec
