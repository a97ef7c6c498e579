"""The report: one HTML file that asks nothing of any network, drawn from the JSON of a run."""

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cli.bench.drawing import MANY, Line, fitting, legend, linear, number, plot
from cli.bench.measuring import percent_name
from cli.bench.results import CURVE

_TITLES = {
    "ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "client_queue_time": "Queue in the client",
    "e2el_including_client_queue": "E2E with that queue",
}  # fmt: skip
_MEANINGS = {
    "ttft": "from sending a request to the first piece of its answer",
    "tpot": "mean time per token of one answer, without its first",
    "itl": "between two pieces of an answer",
    "e2el": "from sending a request to the end of its answer",
    "client_queue_time": "waited in the client for others to end",
    "e2el_including_client_queue": "from when it was due to its end",
}
_TRIMMED = 0.999
"""Axes of time end at this share of what is drawn: one outlier would flatten all the rest."""

_STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2330;--dim:#5d6675;--rule:#e2e6ec;--c0:#2563eb;--c1:#d9480f;--c2:#0f8a5f;
--c3:#8b3fc7;--c4:#b7791f;--c5:#c2255c;--warn:#fff4d6;--warnink:#6b4a00;--bad:#c92a2a;--good:#0f7a52}
@media(prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1b2029;--ink:#e6e9ef;--dim:#98a2b3;--rule:#2d3440;
--c0:#6ea8fe;--c1:#ff9b62;--c2:#4fd1a0;--c3:#c79bf2;--c4:#e9c46a;--c5:#f783ac;--warn:#3a2f12;--warnink:#f3d98b;
--bad:#ff8787;--good:#5fd9a8}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif}main{max-width:1240px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:24px;margin:0 0 2px;letter-spacing:-.01em}h2{font-size:16px;margin:0 0 10px}
.dim,figcaption{color:var(--dim)}header{margin-bottom:20px}code{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;
overflow-wrap:anywhere}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.tile,section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.tile span{color:var(--dim);font-size:13px}.tile small{font-size:14px;font-weight:500;color:var(--dim)}
section{margin-top:16px;overflow-x:auto}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));
gap:16px;margin-top:16px}.plots section{margin:0}figure{margin:0}figcaption{font-size:13px;margin-top:2px;display:flex;
gap:14px;flex-wrap:wrap}figcaption span{white-space:nowrap}svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font-size:11px;font-variant-numeric:tabular-nums}svg .axis{font-size:11.5px}
.grid{stroke:var(--rule);stroke-width:1}.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.area{fill:var(--c);opacity:.13}.dots{fill:none;stroke:var(--c);stroke-width:3.4;stroke-linecap:round;opacity:.42}
.mark{stroke:var(--dim);stroke-dasharray:4 3}.marked{font-size:10.5px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);margin-right:5px;vertical-align:-1px}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}.s5{--c:var(--c5)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th{color:var(--dim);font-weight:500;
font-size:13px}td,th{text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
td:first-child,th:first-child{text-align:left;padding-left:0}tr:last-child td{border-bottom:0}
td.text{text-align:left;white-space:normal}.warn{background:var(--warn);color:var(--warnink);border-color:transparent}
.warn ul{margin:0;padding-left:18px}.bad{color:var(--bad)}.good{color:var(--good)}details summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:10px 0 0}dt{color:var(--dim)}dd{margin:0}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def page(result: Mapping[str, Any]) -> str:
    """Of a result of `baton bench`; of `vllm bench serve` what it has."""
    own: Mapping[str, Any] = result.get("baton", {})
    title = str(result.get("label") or "baton bench")
    parts = [
        f"<header><h1>{escape(title)}</h1><div class=dim>{_subtitle(result)}</div></header>",
        _warnings(own.get("warnings", [])),
        _tiles(result, own),
        _latencies(result, own),
    ]
    if own:
        plots = [*_curves(own), *_over_time(own)]
        parts.append(f"<div class=plots>{''.join(plots)}</div>")
        parts += [_turns(own), _errors(own), _client(own), _settings(own)]
    body = "".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _subtitle(result: Mapping[str, Any]) -> str:
    own = result.get("baton", {})
    words = [str(result.get("model_id") or "?"), str(own.get("settings", {}).get("url", result.get("backend", "")))]
    with contextlib.suppress(KeyError, ValueError):
        words.append(f"{datetime.datetime.strptime(str(result['date']), '%Y%m%d-%H%M%S'):%Y-%m-%d %H:%M:%S}")
    rate, most = result.get("request_rate"), result.get("max_concurrency")
    if own.get("settings", {}).get("open_loop") or isinstance(rate, float | int):
        timed = f"open loop, {number(float(rate))} sessions/s" if isinstance(rate, float | int) else "open loop"
        words.append(timed + (f", at most {most} at once" if most else ""))
    elif most:
        words.append(f"closed loop of {most} streams")
    return " &middot; ".join(escape(word) for word in words if word)


def _warnings(said: Sequence[str]) -> str:
    if not said:
        return ""
    items = "".join(f"<li>{escape(each)}</li>" for each in said)
    return f'<section class=warn style="margin:0 0 16px"><ul>{items}</ul></section>'


def _tiles(result: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    failed = int(result.get("failed", 0))
    failures = f"<span class=bad>{failed:,} failed</span>" if failed else "none failed"
    done = f"requests: {result.get('completed', 0):,} in {result.get('duration', 0.0):.1f} s, {failures}"
    tiles = [
        (number(result["request_throughput"]), "/s", done),
        (
            number(result["output_throughput"]),
            "/s",
            f"tokens of answers, {result.get('total_output_tokens', 0):,} in all",
        ),
    ]
    if result.get("request_goodput") is not None:
        share = result["request_goodput"] / result["request_throughput"] if result["request_throughput"] else 0.0
        bounds = ", ".join(f"{_TITLES[name]} &le; {bound:g} ms" for name, bound in own.get("objectives_ms", {}).items())
        tiles.append(
            (number(result["request_goodput"]), "/s", f"goodput: {share:.1%} kept {bounds or 'all objectives'}")
        )
    for name in ("ttft", "tpot", "e2el"):
        if f"median_{name}_ms" in result:
            tail = f"p99_{name}_ms"
            more = f"; p99 {number(result[tail])} ms" if tail in result else ""
            tiles.append((number(result[f"median_{name}_ms"]), " ms", f"{_TITLES[name]}, median{more}"))
    cells = "".join(
        f"<div class=tile><b>{value}<small>{unit}</small></b><span>{what}</span></div>" for value, unit, what in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _latencies(result: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    shown = [name for name in _TITLES if f"mean_{name}_ms" in result]
    if not shown:
        return ""
    percents = [percent_name(each) for each in own.get("percentiles", [])]
    if not percents:  # of vllm
        tail = "_ttft_ms"
        percents = [key.removesuffix(tail) for key in result if key.endswith(tail) and key[0] == "p"]
    columns = ["mean", "std", "median", *(each for each in percents if each != "p50")]
    head = "".join(f"<th>{each}" for each in columns)
    rows = "".join(
        f'<tr><td title="{_MEANINGS[name]}">{_TITLES[name]}'
        + "".join(f"<td>{_cell(result, f'{each}_{name}_ms')}" for each in columns)
        for name in shown
    )
    return f"<section><h2>Latencies, ms</h2><table><tr><th>{head}{rows}</table></section>"


def _cell(result: Mapping[str, Any], key: str) -> str:
    return f"{result[key]:,.2f}" if isinstance(result.get(key), float | int) else ""


# Plots


def _figure(title: str, drawn: str, lines: Sequence[Line], note: str = "") -> str:
    keys = legend(lines) if len(lines) > 1 else ""
    caption = f"<figcaption>{keys}{escape(note)}</figcaption>" if keys or note else ""
    return f"<section><figure><h2>{escape(title)}</h2>{drawn}{caption}</figure></section>"


def _curves(own: Mapping[str, Any]) -> list[str]:
    """Which share of requests, or gaps, took at most so long."""
    figures = []
    curves, objectives = own["curves_ms"], own["objectives_ms"]
    for name, style in (("ttft", "s0"), ("itl", "s1"), ("tpot", "s3"), ("e2el", "s2")):
        values = curves.get(name)
        if not values:
            continue
        axis = fitting(max(min(values), 1e-2), max(values))
        marks = [(float(objectives[name]), "objective")] if name in objectives else []
        line = Line(_TITLES[name], values, CURVE, style)
        drawn = plot([line], axis, linear(100.0), f"{_TITLES[name]}, ms", "% at most", marks=marks)
        figures.append(_figure(f"{_TITLES[name]}: {_MEANINGS[name]}", drawn, [line]))
    return figures


def _over_time(own: Mapping[str, Any]) -> list[str]:
    timeline = own["timeline"]
    seconds = len(timeline["tokens"])
    if seconds < 1:
        return []
    xs = [each + 0.5 for each in range(seconds)]
    x = linear(float(seconds))
    figures = []

    def draw(title: str, y_title: str, lines: list[Line], note: str = "") -> None:
        top = max((max(line.ys, default=0.0) for line in lines), default=0.0)
        figures.append(_figure(title, plot(lines, x, linear(max(top, 1.0)), "s of the run", y_title), lines, note))

    draw("Throughput", "tokens/s", [Line("tokens of answers", xs, timeline["tokens"], "s0", filled=True)],
         "of answers that came to their end")  # fmt: skip
    asked = [Line("sent", xs, timeline["sent"], "s0"), Line("ended", xs, timeline["ended"], "s2")]
    if own["settings"].get("open_loop"):
        asked.insert(0, Line("due", xs, timeline["due"], "s4"))
    if any(timeline["failed"]):
        asked.append(Line("sent, then failed", xs, timeline["failed"], "s5"))
    draw("Arrivals", "requests/s", asked)
    draw("Requests on their way", "requests", [Line("running", xs, timeline["running"], "s3", filled=True)],
         "mean of each second")  # fmt: skip
    points = [(float(at), float(ms)) for at, ms in timeline["ttft_points"]]
    if points:
        values = sorted(ms for _, ms in points)
        top = values[min(len(values) - 1, int(_TRIMMED * len(values)))]
        y = fitting(max(values[0], 1e-2), top) if top > MANY * values[0] else linear(1.05 * top)
        drawn = plot([], x, y, "s of the run, when it was sent", "TTFT, ms", points=points)
        figures.append(_figure("TTFT over time", drawn, [], f"{len(points)} requests" if len(points) < 2000 else ""))
    return figures


# Tables


def _turns(own: Mapping[str, Any]) -> str:
    if not own["ttft_by_turn"]:
        return ""
    rows = "".join(
        f"<tr><td>{each['turn']}<td>{each['requests']:,}<td>{each['mean_ttft_ms']:,.2f}<td>{each['median_ttft_ms']:,.2f}"
        f"<td>{each['p99_ttft_ms']:,.2f}"
        for each in own["ttft_by_turn"]
    )
    head = "<tr><th>turn<th>requests<th>mean<th>median<th>p99"
    return f"<section><h2>TTFT by turn of a session, ms</h2><table>{head}{rows}</table></section>"


def _errors(own: Mapping[str, Any]) -> str:
    if not own["errors"]:
        return ""
    rows = "".join(
        f"<tr><td>{escape(kind)}<td>{count:,}<td class=text>{escape(own['error_examples'].get(kind, ''))}"
        for kind, count in own["errors"].items()
    )
    head = "<tr><th>kind<th>requests<th style='text-align:left'>the first, in the server's words"
    return f"<section><h2>Not completed</h2><table>{head}{rows}</table></section>"


def _client(own: Mapping[str, Any]) -> str:
    health = own["health"]
    facts = {
        "processes that sent": str(health["clients"]),
        "of a core, each": ", ".join(f"{share:.0%}" for share in health["cpu_share"]),
        "lag of the event loop": f"p99 {health['p99_lag']:.2f} ms, longest {health['max_loop_lag_ms']:.2f} ms",
        "connections": f"{health['connections']:,} opened, {health['reconnections']:,} taken up and found closed",
    }
    if own["settings"].get("open_loop"):
        late = f"p99 {health['p99_send_delay']:.2f} ms, longest {health['max_send_delay_ms']:.2f} ms"
        facts["sent later than due"] = late
    if own["asked_input_tokens"]:
        facts["prompt tokens, counted of asked"] = f"{own['counted_input_tokens'] / own['asked_input_tokens']:.4f}"
    if own["asked_again"]:
        facts["asked again after a 429"] = f"{own['asked_again']:,} times"
    note = "How much of what was measured may be the client's own: an answer may be seen so much later than it came."
    return f"<section><h2>The client</h2><div class=dim>{note}</div>{_list(facts)}</section>"


def _settings(own: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in own["settings"].items() if value not in ("", None)}
    command = settings.pop("command", "")
    facts = _list({name.replace("_", " "): str(value) for name, value in settings.items()})
    said = f"<p><code>{escape(command)}</code></p>{facts}"
    return f"<section><details open><summary>Settings</summary>{said}</details></section>"


def _list(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}<dd>{escape(value)}" for name, value in facts.items()) + "</dl>"
