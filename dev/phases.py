"""Renders the course's three pages to PDF: `python -m dev.phases [FOLDER]`, outputs/phases by default.

Markdown becomes self-contained HTML, and a headless browser or pandoc prints it. Where neither is installed, the HTML
stays and a sentence says what to install.
"""

import argparse
import base64
import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"phase1": ("phase1.md", "answers.md"), "phase2": ("phase2.md", "kv_cache.md"), "phase3": ("phase3.md",)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
ENGINES = ("weasyprint", "wkhtmltopdf")  # of pandoc, those that print HTML
STYLE = """
body { font: 10pt/1.45 serif; max-width: 17cm; margin: auto; } table { border-collapse: collapse; font-size: 8.5pt; }
td, th { border: 0.5pt solid #999; padding: 2pt 4pt; vertical-align: top; overflow-wrap: anywhere; }
img { max-width: 100%; }
pre { font-size: 8pt; white-space: pre-wrap; background: #f4f4f4; padding: 4pt; } @page { size: A4; margin: 18mm; }
"""
SECONDS_TO_PRINT = 120


def render(names: tuple[str, ...]) -> str:
    """The pages, one after the other, as HTML that needs no other file."""
    parser = MarkdownIt("commonmark").enable("table")
    body = "<hr>".join(parser.render((DOCS / name).read_text(encoding="utf-8")) for name in names)
    title = html.escape(names[0].removesuffix(".md"))
    body = _with_pictures(_with_anchors(body, names))
    return f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>{body}"


def _with_anchors(body: str, names: tuple[str, ...]) -> str:
    """Give each heading the id that GitHub gives it, and let links between the pages stay within the document."""

    def add_id(match: re.Match[str]) -> str:
        text = html.unescape(re.sub(r"<[^>]+>", "", match[2])).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        return f'<h{match[1]} id="{anchor}">{match[2]}</h{match[1]}>'

    body = re.sub(r"<h([1-6])>(.*?)</h\1>", add_id, body)
    return re.sub(rf'href="(?:{"|".join(map(re.escape, names))})#', 'href="#', body)


def _with_pictures(body: str) -> str:
    def embed(match: re.Match[str]) -> str:
        picture = base64.b64encode((DOCS / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    return re.sub(r'src="([^":]+\.png)"', embed, body)


def printing_command(page: Path, target: Path) -> list[str] | None:
    """The command that prints an HTML file to PDF with what is installed; None if nothing is."""
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
        return [browser, *flags, f"--print-to-pdf={target}", page.as_uri()]
    if (pandoc := shutil.which("pandoc")) and (engine := next(filter(shutil.which, ENGINES), None)):
        return [pandoc, str(page), "--pdf-engine", engine, "--output", str(target)]
    return None


def printed(command: list[str], target: Path) -> str | None:
    """Print a page, and return what went wrong, if anything did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_PRINT)
    except subprocess.TimeoutExpired:
        return f"it has not ended in {SECONDS_TO_PRINT} s"
    return None if done.returncode == 0 and target.is_file() else done.stderr.strip()[-500:] or "no output"


def main() -> int:
    """Write every page; print where it is."""
    parser = argparse.ArgumentParser(prog="python -m dev.phases", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/phases"))
    folder = parser.parse_args().folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{folder}: {error.strerror}")
    for name, sources in PAGES.items():
        page, target = folder / f"{name}.html", folder / f"{name}.pdf"
        page.write_text(render(sources), encoding="utf-8")
        command = printing_command(page, target)
        if command is None:
            print(f"{page}: for a PDF install a browser such as chromium, or pandoc and weasyprint")
            continue
        if problem := printed(command, target):
            print(f"{page}: {command[0]} failed: {problem}", file=sys.stderr)
            return 1
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
