// The figures to see at a glance, each with its last minutes.

import { sparkline } from "./charts.js";
import { at, element, fill, say } from "./dom.js";
import { deaths, failures, period, sum, totalBlocks } from "./figures.js";
import { count, percent, seconds, some } from "./format.js";

const HISTORY = 180; // looks, one a second
let looks = []; // only what this page has seen
let started = null;

export function tiles(feed) {
  remember(feed);
  const last = looks.at(-1);
  const { recent } = feed;
  const { ttft, itl } = recent.latencies;
  const ready = feed.workers.filter((worker) => worker.state === "ready" && worker.breaker === "closed").length;
  const died = deaths(feed).length;
  const blocks = totalBlocks(feed.workers);
  const refused = sum(Object.values(recent.refused));
  const span = period(feed);
  const quarantined = blocks.quarantined ? `, ${count(blocks.quarantined)} quarantined` : "";
  const tiles = [
    ["Output", count(last.tokens), "tok/s", "tokens", `${some(recent.tokens.delivered ?? 0, "token")}, ${span}`],
    ["Streams on their way", count(last.streams), "", "streams", some(feed.requests, "request")],
    ["First token, median", seconds(ttft.p50), "", "ttft", `p99 ${seconds(ttft.p99)}, ${span}`],
    ["Between tokens, median", seconds(itl.p50), "", "itl", `p99 ${seconds(itl.p99)}, ${span}`],
    [
      "Completed",
      count(last.requests),
      "/s",
      "requests",
      `${count(failures(recent.requests))} failed, ${count(refused)} refused`,
    ],
    [
      "KV in use",
      percent(blocks.held + blocks.leased, blocks.total),
      "",
      "kv",
      `${percent(blocks.cached, blocks.total)} cached${quarantined}`,
    ],
    [
      "Workers",
      `${count(ready)}`,
      `of ${count(feed.num_workers)} well`,
      null,
      `${died ? count(died) : "none"} died in 5 min`,
    ],
  ];
  if (!at("tiles").children.length)
    at("tiles").append(
      ...tiles.map(() =>
        element(
          "div",
          { class: "tile" },
          ...["name", "value", "chart", "note"].map((name) => element("div", { class: name })),
        ),
      ),
    );
  tiles.forEach(([name, value, unit, series, note], index) => {
    const [head, figure, chart, foot] = at("tiles").children[index].children;
    say(head, name);
    fill(figure, [value, unit], () => [`${value} `, element("small", {}, unit)]);
    if (series)
      chart.replaceChildren(
        sparkline(
          looks.map((look) => look[series]),
          `${name} over the last minutes`,
        ),
      );
    say(foot, note);
  });
}

function remember(feed) {
  if (started !== feed.started) looks = []; // another process: it counts from 0
  started = feed.started;
  const { recent } = feed;
  const blocks = totalBlocks(feed.workers);
  looks.push({
    tokens: recent.tokens_per_s === null ? null : Math.round(recent.tokens_per_s),
    streams: sum(Object.values(feed.on_their_way.stages)),
    ttft: recent.latencies.ttft.p50,
    itl: recent.latencies.itl.p50,
    kv: blocks.total ? (blocks.held + blocks.leased) / blocks.total : null,
    requests: recent.window_s > 1 ? (recent.requests.completed ?? 0) / recent.window_s : null,
  });
  if (looks.length > HISTORY) looks.shift();
}
