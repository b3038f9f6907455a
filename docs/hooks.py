"""What MkDocs does not do by itself: figures from results/, and `>>>` lines in docstrings.

The pages link to files of the repository, as `../results/...`, which is right where the repository
itself is read (GitHub). The site is built from docs/ alone: the files of results/ are added, links
to them are turned, and of links to files that the site has not, such as sources, the text stays.
"""

import pathlib
import posixpath
import re

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
SHOWN = (".md", ".png", ".svg", ".csv")
CODE_OR_LINK = re.compile(
    r"```.*?```|`[^`\n]*`|\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL,
)


def on_files(files, config):
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in SHOWN:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    own = posixpath.dirname(page.file.src_uri)
    folder = own if own.startswith("results") else posixpath.join("docs", own)

    def turned(link):
        if not link["target"]:
            return link[0]  # code
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        target = posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
        if not files.get_file_from_path(target):
            return text if (ROOT / target).exists() else link[0]  # MkDocs warns of the latter
        return f"[{text}]({posixpath.relpath(target, own or '.')}{anchor})"

    return CODE_OR_LINK.sub(turned, markdown)


class Doctests(griffe.Extension):
    """Puts blocks of `>>>` lines of docstrings into fences: Markdown takes them for quotations."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"(?m)(^ *(>>>|\.\.\.) .*\n?)+",
                lambda block: f"```python\n{_source(block[0])}\n```\n",
                obj.docstring.value,
            )


def _source(block):
    return "\n".join(line.strip()[4:] for line in block.rstrip().splitlines())
