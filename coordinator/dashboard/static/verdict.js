// What to know first, in a sentence; the rest of it in a list.

import { at, element, fill, say } from "./dom.js";
import { some } from "./format.js";
import { sum } from "./figures.js";

const LEVELS = { bad: ["✕", "bad"], warn: ["▲", "warn"], info: ["○", "muted"] };
let announced = "";

export function verdict(feed) {
  const [first, ...rest] = feed.alerts;
  const calm = !first || first.level === "info";
  const streams = sum(Object.values(feed.on_their_way.stages));
  at("verdict").dataset.level = calm ? "good" : first.level;
  say(
    at("verdict-line"),
    calm ? `All well: ${some(feed.num_workers, "worker")}, ${some(streams, "stream")} on their way.` : first.text,
  );
  const listed = calm ? feed.alerts : rest;
  fill(at("alerts"), listed, () =>
    listed.map(({ level, text }) =>
      element(
        "li",
        {},
        element("em", { class: `mark ${LEVELS[level][1]}`, "aria-hidden": true }, LEVELS[level][0]),
        text,
      ),
    ),
  );
  // Spoken only when something else is the matter, not when seconds pass.
  const gist = feed.alerts.map(({ text }) => text.replace(/\d+/g, "#")).join(" ");
  if (gist !== announced) {
    announced = gist;
    say(at("announced"), feed.alerts.map(({ text }) => text).join(" ") || "All well.");
  }
}
