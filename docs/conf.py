"""The documentation as a site: the pages of docs/ and a reference made from the docstrings of the installed package.

`sphinx-build -W -b html docs build/docs`, with the extra `docs`; warnings are errors, so that a name that is no more,
or a docstring that cannot be read, ends the build. Nothing is fetched.
"""

import re

import shadowcore

project = "shadowcore"
author = "The shadowcore developers"
copyright = author
version = release = shadowcore.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository that are no pages
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"shadowcore {version}"
html_show_copyright = False
html_copy_source = False

default_role = "literal"
smartquotes = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100

NAMES = r"[a-z_]\w*(?:, [a-z_]\w*)*(?: \([^()]*\))?: "
FIELD = re.compile(rf"({NAMES})(\S.*)")
"""What a docstring says of a parameter or attribute: `size: bytes`, `expected, expected_high (u8): what ...`."""
PIECES = re.compile(rf"(?<=[.;:]) (?={NAMES}|Returns |Raises |[A-Z]\w+Error\b)")


def with_fields(app, what, name, obj, options, lines):
    """Fields, a line or a sentence each, become the terms of a list; what is indented becomes code."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    kind = FIELD.fullmatch(lines[0]) if lines else None
    if what in ("attribute", "property") and kind and kind[1] == name.rpartition(".")[2] + ": ":
        lines[0] = f"({kind[2]})"  # the signature that Cython embeds
    out = []
    for paragraph in "\n".join(lines).split("\n\n"):
        rows = paragraph.split("\n")
        pieces = PIECES.split(" ".join(row.strip() for row in rows))
        if paragraph.strip() and all(row.startswith("    ") for row in rows if row):
            out += ["::", "", *rows]
        elif any(map(FIELD.fullmatch, pieces)):
            for piece in pieces:
                field = FIELD.fullmatch(piece)
                out += [f"``{field[1][:-2]}``", "    " + field[2]] if field else ["", piece, ""]
        else:
            out += rows
        out.append("")
    lines[:] = out


SECTION = re.compile(r"## (.+)\n\n((?:- \[.*\]\(.*\)\n)+)")


def with_tree(app, docname, source):
    """The lists of the first page, which reads well in the repository, are the tree of the site as well."""
    if docname == "index":
        for caption, lines in SECTION.findall(source[0] + "\n"):
            pages = "\n".join(re.findall(r"\(([\w/-]+)\.(?:md|rst)\)", lines))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n{pages}\n```\n"


def setup(app):
    app.connect("source-read", with_tree)
    app.connect("autodoc-process-docstring", with_fields)
