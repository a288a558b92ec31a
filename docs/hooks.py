"""What the site generates: the reference of conf/ and signatures, pages of the repository's own files, diagrams."""

import ast
import re
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
GROUPS = ("method", "dataset", "transform", "refine")
"""Whose files list the arguments of a class or a function."""
PLAIN = ("protocol", "trainer", "logger", "pipeline", "pipeline/recipe", "literature", "recipe", "experiment")
"""Whose files hold values alone."""
COMMANDS = {word: f"data {word}" for word in ("check", "voc", "coco", "shards", "index", "weights")}
REPOSITORY = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "configuration.md", content=configuration()))
    for page, source in REPOSITORY.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"^```diagram\n(.*?)^```$", lambda match: diagram(match[1]), markdown, flags=re.M | re.S)


def configuration() -> str:
    """The page of all that can be set."""
    parts = [
        "# Configuration",
        "Made from `conf/` and the signatures of this version. `wsss-train --help` prints what holds for a run.",
        "## Commands",
    ]
    for path in sorted(CONF.glob("*.yaml")):
        parts += [f"### wsss-{COMMANDS.get(path.stem, path.stem)}", listing(path)]
    for group in GROUPS:
        parts.append(f"## {group}=")
        for path in sorted((CONF / group).glob("*.yaml")):
            parts += [f"### {group}={path.stem}", *arguments(path)]
    for group in PLAIN:
        parts.append(f"## {group}")
        for path in sorted((CONF / group).glob("*.yaml")):
            body = "\n".join("    " + line for line in listing(path).splitlines())
            parts.append(f'??? note "{group}/{path.stem}.yaml"\n\n{body}')
    return "\n\n".join(parts) + "\n"


def listing(path: Path) -> str:
    return f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"


def arguments(path: Path) -> list[str]:
    """A table of the values of a file, with kind and meaning from the signature of what it builds."""
    text = path.read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    target = values.pop("_target_", None) or values.pop("_partial_", None)
    kinds, meanings = signature(target) if target else ({}, {})
    head = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    rows = ["| key | default | kind | meaning |", "|---|---|---|---|"]
    for key, value in values.items():
        default = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        cells = (f"`{key}`", f"`{default}`", f"`{kinds[key]}`" if key in kinds else "", meanings.get(key, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*([" ".join(head)] if head else []), *([f"`{target}`"] if target else []), "\n".join(rows)]


def signature(target: str) -> tuple[dict[str, str], dict[str, str]]:
    """Annotation and documentation of each argument, read from the source: nothing is imported."""
    parts = target.split(".")
    paths = (
        (ROOT.joinpath(*parts[:count]).with_suffix(".py"), parts[count:]) for count in range(len(parts) - 1, 0, -1)
    )
    path, names = next((path, names) for path, names in paths if path.is_file())
    found: Any = ast.parse(path.read_text(encoding="utf-8"))
    for name in names:
        found = next(node for node in found.body if getattr(node, "name", None) == name)
    function = found
    if isinstance(found, ast.ClassDef):
        function = next((node for node in found.body if getattr(node, "name", None) == "__init__"), found)
    given = function.args.args + function.args.kwonlyargs if isinstance(function, ast.FunctionDef) else []
    kinds = {one.arg: ast.unparse(one.annotation) for one in given if one.annotation is not None}
    if isinstance(found, ast.ClassDef) and function is found:  # a dataclass
        fields = (node for node in found.body if isinstance(node, ast.AnnAssign))
        kinds = {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}
    documented = ast.get_docstring(found) or ""
    listed = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", documented + "\n", flags=re.M)
    meanings: dict[str, str] = {}
    for entry in re.split(r"^ {4}(?=\w)", listed[1] if listed else "", flags=re.M):
        names, _, meaning = entry.partition(":")
        meanings |= dict.fromkeys(re.split(r",\s*", names.strip()), " ".join(meaning.split()))
    return kinds, meanings


WIDTH, HEIGHT, GAP = 150, 44, 34


def diagram(text: str) -> str:
    """Lines `a -> b -> c` as a picture: a node stands right of all that it comes from; a loss is marked."""
    chains = [[name.strip() for name in line.split("->")] for line in text.strip().splitlines()]
    edges = [pair for chain in chains for pair in pairwise(chain)]
    nodes = list(dict.fromkeys(name for chain in chains for name in chain))
    column = dict.fromkeys(nodes, 0)
    for _ in nodes:  # the longest way from the left
        for start, end in edges:
            column[end] = max(column[end], column[start] + 1)
    rows: dict[str, int] = {}
    for number, chain in enumerate(chains):
        for name in chain:
            rows.setdefault(name, number)
    taken: set[tuple[int, int]] = set()
    for name in nodes:
        while (column[name], rows[name]) in taken:
            rows[name] += 1
        taken.add((column[name], rows[name]))
    place = {name: (column[name] * (WIDTH + GAP) + 6, rows[name] * (HEIGHT + 18) + 6) for name in nodes}
    right, bottom = (max(values) for values in zip(*place.values(), strict=True))
    width, height = right + WIDTH + 6, bottom + HEIGHT + 6
    shapes = []
    for start, end in edges:
        (x0, y0), (x1, y1) = place[start], place[end]
        x0, y0, y1 = x0 + WIDTH, y0 + HEIGHT / 2, y1 + HEIGHT / 2
        near, bend = x1 - GAP, x1 - GAP / 2  # along its own row as far as it goes
        shapes.append(f'<path d="M{x0} {y0} H{near} C{bend} {y0} {bend} {y1} {x1 - 5} {y1}" class="way"/>')
        shapes.append(f'<path d="M{x1 - 7} {y1 - 4} L{x1} {y1} L{x1 - 7} {y1 + 4}Z" class="tip"/>')
    for name, (x, y) in place.items():
        kind = "loss" if name.startswith("loss ") else "node"
        shapes.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" class="{kind}"/>')
        lines = wrap(name)
        for number, line in enumerate(lines):
            height_of = y + HEIGHT / 2 + 4 + 14 * (number - (len(lines) - 1) / 2)
            shapes.append(f'<text x="{x + WIDTH / 2}" y="{height_of}">{escape(line)}</text>')
    style = (
        ".wsss-diagram{max-width:100%;height:auto}.wsss-diagram text{font:12px sans-serif;text-anchor:middle;"
        "fill:var(--md-default-fg-color)}.wsss-diagram rect{fill:var(--md-code-bg-color);stroke:#5c6bc0}"
        ".wsss-diagram .loss{stroke:#e53935;stroke-dasharray:4 2}.wsss-diagram .way{fill:none;stroke:#888}"
        ".wsss-diagram .tip{fill:#888}"
    )
    label = escape("; ".join(" to ".join(chain) for chain in chains), quote=True)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg class="wsss-diagram" role="img" aria-label="{label}" {size}><style>{style}</style>'
    return f"{head}{''.join(shapes)}</svg>"


def wrap(name: str, most: int = 22) -> list[str]:
    lines: list[str] = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
