"""Take outputs and execution counts out of notebooks: python strip_output.py [--check] FILE.ipynb ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def stripped(text: str) -> str:
    """The notebook ``text`` without outputs, counts and what depends on who ran it."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    files = [Path(each) for each in arguments if each != "--check"]
    changed = [file for file in files if stripped(file.read_text()) != file.read_text()]
    for file in changed:
        print(f"{file}: has outputs or metadata")
        if "--check" not in arguments:
            file.write_text(stripped(file.read_text()))
    return int(bool(changed) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
