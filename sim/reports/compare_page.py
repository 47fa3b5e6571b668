"""A comparison of recipes as one page, `compare.html`: what was asked, a table, pictures, and every run's settings.

It is one file that asks nothing of a network: pictures are in it as SVG, the style is its own, and there is no script.
So it can be mailed, or kept beside the records for years. All text from outside, such as names and paths, is escaped.
Why not a library of charts: each is larger than all figures together, and needs a script to show them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from ...protocol.schedule import schedule_title
from .compare_console import (
    NOT_REACHED,
    beside_columns,
    beside_text,
    bytes_text,
    compare_lines,
    duration,
    fastest,
    loss_text,
    over_text,
    pace_text,
    time_text,
)
from .compare_figures import COLOURS, figures

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2128; --soft: #59636e; --line: #d5dae0; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --text: #e3e7ec; --soft: #9aa4af; --line: #343b44; --card: #1c2128; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p, li { max-width: 60rem; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, th.left, td.left { text-align: left; }
td.left, td small { white-space: normal; }
td small { display: block; color: var(--soft); font-weight: 400; }
.best { font-weight: 700; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem 1rem; border: 1px solid var(--line); border-radius: .5rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--card); padding: .75rem; border-radius: .4rem; overflow-x: auto; }
"""


def compare_page(found: dict[str, Any]) -> str:
    """The whole file. found: as `compare.json` holds it."""
    title = escape(f"thinpipe compare: {found['title']}")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in _sentences(found)),
        "<h2>The recipes</h2>",
        *_table(found),
        "<h2>Pictures</h2>",
        '<div class="figures">',
        *(f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>" for name, drawn in figures(found)),
        "</div>",
        f'<p class="soft">{escape(_legend(found))}</p>',
        "<h2>A step over each link</h2>",
        f'<p class="soft">{escape(pace_text(found))}. Simulated, not measured.</p>',
        *_steps(found),
        "<h2>Every run</h2>",
        *_runs(found),
        "<h2>Made with</h2>",
        f"<p>{escape(', '.join(f'{name} {version}' for name, version in found['versions'].items()))}</p>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _sentences(found: dict[str, Any]) -> Iterator[str]:
    for line in compare_lines(found):
        yield f"{line[0].upper()}{line[1:]}."


def _legend(found: dict[str, Any]) -> str:
    beaten = "The grey line joins recipes that no other one beats in both loss and bytes."
    if len(found["seeds"]) == 1:
        return beaten
    return (
        f"{beaten} Lines are means over the seeds, thin ones are single seeds; bars go from the best seed to the worst."
    )


def _key(index: int) -> str:
    return f'<span class="key" style="background:{COLOURS[index % len(COLOURS)]}"></span>'


def _table(found: dict[str, Any]) -> Iterator[str]:
    first = found["recipes"][0]
    target = found["target_loss"]
    yield '<div class="wide"><table><thead><tr><th>recipe</th><th class="left">codec, own settings</th>'
    beside = beside_columns(found)
    lateral = [f"{title}, bytes/token" for title in beside]
    columns = ("held-out loss", "over the first", "bytes/token", "ratio", *lateral)
    for column in (*columns, f"steps to {loss_text(target)}"):
        yield f"<th>{escape(column if target is not None else column.partition(' to ')[0])}</th>"
    yield "".join(f"<th>time over<br>{escape(link)}</th>" for link in found["links"]) + "</tr></thead><tbody>"
    for index, recipe in enumerate(found["recipes"]):
        own = f"<small>{escape(' '.join(recipe['own_settings']))}</small>" if recipe["own_settings"] else ""
        steps = recipe["steps_to_target"]
        sizes = (*bytes_text(recipe), *(beside_text(recipe, field) for field in beside.values()))
        yield (
            f"<tr><td>{_key(index)}{escape(recipe['name'])}</td>"
            f'<td class="left"><code>{escape(recipe["codec"])}</code>{own}</td>'
            f"<td>{loss_text(recipe['loss'])}{_by_seed(recipe)}</td><td>{escape(over_text(recipe))}</td>"
            f"<td>{'</td><td>'.join(sizes)}</td>"
            f"<td>{NOT_REACHED if steps is None else f'{steps:,.0f}'}<small>of {recipe['steps']:,}</small></td>"
        )
        for link in found["links"]:
            best = ' class="best"' if recipe["name"] in fastest(found, link) else ""
            yield f"<td{best}>{escape(time_text(recipe, link))}{_times_faster(recipe, first, link)}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"


def _by_seed(recipe: dict[str, Any]) -> str:
    if len(recipe["losses"]) == 1:
        return ""
    return f"<small>{', '.join(map(loss_text, recipe['losses']))}</small>"


def _times_faster(recipe: dict[str, Any], first: dict[str, Any], link: str) -> str:
    """Beside the first recipe."""
    own, base = (each["links"][link]["time_to_target_s"] for each in (recipe, first))
    if recipe is first or not own or not base:
        return ""
    return f"<small>{base / own:,.3g}x as fast</small>"


def _steps(found: dict[str, Any]) -> Iterator[str]:
    """What the times are made of."""
    yield '<div class="wide"><table><thead><tr><th>recipe</th><th>bytes of a microbatch<br>down, up</th><th>ratio</th>'
    yield "".join(f"<th>{escape(link)}</th>" for link in found["links"]) + "</tr></thead><tbody>"
    for index, recipe in enumerate(found["recipes"]):
        any_link = next(iter(recipe["links"].values()))
        sizes = any_link["bytes_per_microbatch"]
        yield f"<tr><td>{_key(index)}{escape(recipe['name'])}</td>"
        yield f"<td>{sizes['forward']:,}, {sizes['backward']:,}</td><td>{any_link['ratio']:,.1f}x</td>"
        for link in found["links"]:
            step = recipe["links"][link]
            schedule, busiest = escape(schedule_title(step["schedule"])), escape(step["bottleneck"])
            yield (
                f"<td>{duration(step['step_s'])}<small>{step['tokens_per_s']:,.0f} tokens/s</small>"
                f"<small>{schedule}</small><small>busiest: {busiest}</small></td>"
            )
        yield "</tr>"
    yield "</tbody></table></div>"


def _runs(found: dict[str, Any]) -> Iterator[str]:
    for index, recipe in enumerate(found["recipes"]):
        for run in recipe["runs"]:
            yield (
                f"<details><summary>{_key(index)}{escape(recipe['name'])}, seed {run['seed']}: "
                f"{escape(_outcome(run))}; <code>{escape(run['directory'])}/</code></summary>"
                f"<pre>{escape(chr(10).join(_settings(run['settings'])))}</pre></details>"
            )


def _outcome(run: dict[str, Any]) -> str:
    if run["failed"]:
        return f"failed: {run['failed']}"
    end = run["curve"][-1]
    loss = f"held-out loss {loss_text(end['loss'])} after {end['step']:,} steps"
    return f"{loss}, {duration(run['train_s'])} of training"


def _settings(settings: dict[str, Any]) -> Iterator[str]:
    """As `--set` takes them."""
    for section, table in settings.items():
        for key, value in table.items():
            yield f"{section}.{key} = {json.dumps(value)}"
