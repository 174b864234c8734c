"""Inventories of other projects' documentation, so that the site builds without a network as well."""

from __future__ import annotations

import urllib.request
from pathlib import Path


def reachable_inventories(projects: dict[str, str], *, folder: Path) -> dict[str, tuple[str, str]]:
    """``intersphinx_mapping`` of the projects whose inventory is in ``folder`` or can be fetched into it.

    The first project that cannot be reached ends the fetching: without a network one timeout is enough.
    A project that is left out costs its links, and no warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    online = True
    for name, url in projects.items():
        inventory = folder / f"{name}.inv"
        if online and not inventory.exists():
            try:
                request = urllib.request.Request(f"{url}objects.inv", headers={"User-Agent": "Sphinx"})
                with urllib.request.urlopen(request, timeout=5) as answer:
                    content = answer.read()
            except OSError:
                online = False
            else:
                if content.startswith(b"# Sphinx inventory"):
                    inventory.write_bytes(content)
        if inventory.exists():
            mapping[name] = (url, str(inventory))
    return mapping
