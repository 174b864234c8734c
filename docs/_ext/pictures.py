"""A picture links to its file, where its labels are in full size; drawings (SVG) are sharp at any size."""

from __future__ import annotations

import posixpath
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri


def link(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Put each picture of the page ``name`` into a reference to the copy of its file in the site."""
    builder: Any = app.builder
    if builder.format != "html":
        return
    folder = relative_uri(builder.get_target_uri(name), builder.imagedir)
    for image in list(doctree.findall(nodes.image)):
        uri = image["uri"]
        if uri not in app.env.images or uri.endswith(".svg") or isinstance(image.parent, nodes.reference):
            continue
        target = posixpath.join(folder, app.env.images[uri][1])
        reference = nodes.reference("", "", refuri=target, internal=True)
        image.replace_self(reference)
        reference += image


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
