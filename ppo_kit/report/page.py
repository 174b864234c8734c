"""One page per run, to read and to send: the picture, what changed on held-out prompts, sampled responses.

What a model wrote is text here, never markup: the template escapes it, and the page's content security
policy allows no script.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ppo_kit.monitor.metric_names import METRICS
from ppo_kit.report.history import read_json, read_rows

STEPS = 20
"""Steps whose samples are shown: the first, the last, and some between at even distances."""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{{ name }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1b2530;
         max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
  img { width: 100%; border: 1px solid #dde3e9 }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e6ebf0 }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  summary { cursor: pointer; font-weight: 600; padding: .3rem 0 }
  .sample { border-left: 3px solid #c9d5e0; margin: .6rem 0 1rem; padding: 0 0 0 .8rem }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
  .prompt { color: #5b6875 }
  .facts { color: #5b6875; font-size: 13px }
</style>
<h1>{{ name }}</h1>
<p class="facts">{{ facts }}</p>
{% if picture %}<img alt="Metrics over steps" src="data:image/png;base64,{{ picture }}">{% endif %}
{% if rows %}
<h2>Held-out data</h2>
<table>
<tr><th>mean<th>before training<th>after<th>change
{% for metric, meaning, before, after, change in rows -%}
<tr title="{{ meaning }}"><td>{{ metric }}<td class="number">{{ before }}<td class="number">{{ after }}
<td class="number">{{ change }}
{% endfor %}
</table>
{% endif %}
{% if changed %}
<h2>Settings that are not the defaults</h2>
<table>
{% for key, value in changed -%}<tr><td>{{ key }}<td class="text">{{ value }}{% endfor %}
</table>
{% endif %}
<h2>Samples</h2>
{% for step in steps -%}
<details{% if loop.last %} open{% endif %}><summary>Step {{ step.step }}</summary>
{% for sample in step.samples -%}
<div class="sample">
<div class="text prompt">{{ sample.prompt }}</div>
<div class="text">{{ sample.response }}</div>
<div class="facts">{{ sample.facts }}</div>
</div>
{% endfor %}
</details>
{% else %}<p>None.</p>
{% endfor %}
"""


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from the run's files, and return its path.

    Raises:
        ValueError: a file of the run is broken.
    """
    folder = Path(folder)
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    picture = folder / "dashboard.png"
    before, after = summary.get("before", {}), summary.get("after", {})
    names = [name for name in METRICS if name in before and name in after]
    names += [name for name in after if name in before and name not in METRICS]
    steps = read_rows(folder / "samples.jsonl")
    chosen = sorted({round(i * (len(steps) - 1) / (STEPS - 1)) for i in range(STEPS)}) if steps else []
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    text = page.render(
        name=folder.resolve().name,
        facts=_facts(config, summary),
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.exists() else "",
        rows=[(name, METRICS.get(name, name), *_changes(before[name], after[name])) for name in names],
        changed=sorted(config.get("changed", {}).items()),
        steps=[
            {"step": steps[i]["step"], "samples": [_sample(row) for row in steps[i]["samples"]]}
            for i in chosen
        ],
    )
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _facts(config: dict[str, Any], summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())
    parts = [
        f"seed {config['seed']}" if "seed" in config else "",
        f"git {config['git']}" if config.get("git") else "",
    ]
    if "seconds" in summary:
        parts.append(f"{summary['steps']} of {summary['steps_planned']} steps in {summary['seconds']:.0f} s")
    return " · ".join(filter(None, [*parts, versions]))


def _changes(before: float | None, after: float | None) -> tuple[str, str, str]:
    """Both as text, and their difference; None is what was NaN in the run."""
    change = "–" if before is None or after is None else f"{after - before:+.3f}"
    return _number(before), _number(after), change


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _sample(row: dict[str, Any]) -> dict[str, str]:
    facts = [
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key}: {value}"
        for key, value in row.items()
        if key not in ("prompt", "response", "tokens")
    ]
    return {
        "prompt": str(row.get("prompt", "")),
        "response": str(row.get("response", "")),
        "facts": " · ".join(facts),
    }
