// The view of the cluster: every panel, from one answer of the feed.

import { at, element } from "./dom.js";
import { faults, journal, losses, outcomes } from "./faults.js";
import { BLOCKS } from "./figures.js";
import { latencies } from "./latency.js";
import { requests } from "./requests.js";
import { tiles } from "./tiles.js";
import { verdict } from "./verdict.js";
import { kv, lanes, sources, workers } from "./workers.js";

const PANELS = [verdict, tiles, requests, workers, latencies, losses, faults, kv, sources, lanes, outcomes, journal];
let latest = null;

export function cluster(feed) {
  latest = feed;
  for (const panel of PANELS) panel(feed);
}

at("filter").addEventListener("input", () => latest && workers(latest));
for (const radio of document.getElementsByName("period"))
  radio.addEventListener("change", () => latest && latencies(latest));
at("kv-legend").append(
  ...BLOCKS.flatMap((name) => [element("i", { class: "swatch", "data-part": name }), name]),
  element("i", { class: "swatch" }),
  "free",
);
