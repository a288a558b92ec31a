"""What a step of training costs at 20, 80, 300 and 1,000 classes, of which an image shows one or two.

    python tests/benchmarks/classes.py --before DIR [--methods toco seam rcm_mam] [--plot FILE]

DIR is the root of another version of the code, e.g. of `git worktree add DIR COMMIT`. Small networks from random
weights: a vision transformer of timm's tiny size, and ResNet38 of width 8; four images.
"""

import altair
from before_after import HEADER, HERE, Version, compare, parser, show

CLASSES = (20, 80, 300, 1000)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="+", default=["toco", "seam", "rcm_mam"])
    arguments.add_argument("--plot", help="PNG of time and memory by classes")
    given = arguments.parse_args()
    versions, rows = [Version(given.before), Version(HERE)], []
    print(HEADER)
    for method in given.methods:
        for classes in CLASSES:
            case = {"method": method, "classes": classes, "size": given.size, "images": 4}
            found = compare(versions, case, given.rounds)
            show(f"{method} {classes}", found)
            for index, version in enumerate(("before", "after")):
                for what, unit in (("seconds", "CPU seconds a step"), ("mib", "peak MiB")):
                    row = {"method": method, "classes": classes, "version": version, "what": unit}
                    rows.append(row | {"value": found[what][index]})
    if given.plot:
        plot(rows, given.plot)


def plot(rows: list[dict[str, object]], path: str) -> None:
    chart = altair.Chart(altair.Data(values=rows)).mark_line(point=True)
    chart = chart.encode(
        x=altair.X("classes:Q", scale=altair.Scale(type="log"), axis=altair.Axis(values=list(CLASSES))),
        y=altair.Y("value:Q", title=None, scale=altair.Scale(zero=True)),
        color=altair.Color("method:N"),
        strokeDash=altair.StrokeDash("version:N", sort=["after", "before"]),
    )
    panel = chart.properties(width=320, height=240).facet(altair.Facet("what:N", title=None), columns=2)
    panel.resolve_scale(y="independent").save(path, scale_factor=2)


if __name__ == "__main__":
    main()
