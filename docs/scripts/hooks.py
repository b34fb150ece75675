"""What MkDocs does besides: files from outside docs/, links to them, and guides that the nav does not list."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# By their address on the site: files that lie elsewhere in the project.
OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results/parity.md": "experiments/PARITY.md",
    "results/sweeps.md": "experiments/SWEEPS.md",
    "results/benchmarks.md": "experiments/benchmarks/README.md",
    "results/memory.png": "experiments/benchmarks/memory.png",
}
# Pages of numbers, which would stand before every other in a search.
UNSEARCHED = ("results/parity.md", "results/methods.md")
# Signs on a line beside the table of contents; a wider block takes its place.
_WIDTH = 90
_BLOCK = re.compile(r"^```(?!bash)\w*\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?=(#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """Add the pages of docs/guides that the nav does not list to its guides, by name."""
    (guides,) = (section["Guides"] for section in config.nav if "Guides" in section)
    pages = sorted(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).glob("guides/*.md"))
    guides += [page for page in pages if page not in guides]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Bring in the files from outside docs/, and make a page of every notebook."""
    for address, path in OUTSIDE.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.py")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page_of(path.read_text("utf-8"))))
    return files


def page_of(notebook: str) -> str:
    """Return the page of a notebook in jupytext's percent format: its texts, and its code in blocks."""
    parts = []
    for cell in re.split(r"^# %%", notebook, flags=re.MULTILINE)[1:]:
        kind, _, content = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append(re.sub(r"^# ?", "", content, flags=re.MULTILINE).strip())
        else:
            parts.append(f"```python\n{content.replace('  # fmt: skip', '').strip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have links between files of the project hold on the site as in a checkout, and make room for wide blocks."""
    addresses = {path: address for address, path in OUTSIDE.items()}
    here = page.file.src_uri
    if here in UNSEARCHED:
        page.meta["search"] = {"exclude": True}
    if any(len(line) > _WIDTH for block in _BLOCK.finditer(markdown) for line in block["text"].splitlines()):
        page.meta.setdefault("hide", ["toc"])
    source = OUTSIDE.get(here, f"docs/{here}")

    def on_site(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        address = addresses.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return found["path"] if address is None else posixpath.relpath(address, posixpath.dirname(here))

    return _LINK.sub(on_site, markdown)
