"""Write the pages that are made from the code: *Methods*, *Configuration*, and the configuration's JSON Schema.

Usage:
    python -m docs.scripts.reference            # or: make reference
    python -m docs.scripts.reference --check    # exit code 1 where a page is not what it would be
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from docs.scripts import configuration_page, json_schema, method_pages

DOCS = Path(__file__).resolve().parents[1]


def files() -> dict[Path, str]:
    """Return the content of every file that is made from the code."""
    written = {
        **method_pages.pages(),
        "configuration.md": configuration_page.page(),
        "config.schema.json": json.dumps(json_schema.json_schema(), indent=1, ensure_ascii=False) + "\n",
    }
    return {DOCS / name: text for name, text in written.items()}


def outdated() -> list[Path]:
    """Return the files that are not what the code says, and pages of families that there are no more."""
    expected = files()
    stale = [path for path, text in expected.items() if not path.is_file() or path.read_text("utf-8") != text]
    return stale + [path for path in sorted((DOCS / "methods").glob("*.md")) if path not in expected]


def main(arguments: list[str]) -> int:
    """Write the files, or check them, and return the exit code."""
    if arguments == ["--check"]:
        for path in (stale := outdated()):
            sys.stdout.write(f"{path.relative_to(DOCS.parent)}: not up to date; run make reference\n")
        return bool(stale)
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in outdated():
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
