// Figures made of the feed's, and lists of them, that several panels show.

import { element, fill } from "./dom.js";
import { count, seconds } from "./format.js";

export const FAILED = ["failed", "timeout", "poisoned"]; // outcomes of requests
export const LOST_S = 300; // so long a dead worker is shown
export const BLOCKS = ["held", "leased", "quarantined", "cached"];
export const byName = new Intl.Collator(undefined, { numeric: true }).compare;
export const sum = (values) => values.reduce((total, value) => total + value, 0);
export const role = (worker) => (worker.roles.length > 1 ? "mixed" : worker.roles[0]);
export const failures = (outcomes) => sum(FAILED.map((name) => outcomes[name] ?? 0));
export const deaths = (feed) => feed.losses.filter((loss) => loss.died && feed.at - loss.at < LOST_S);
export const period = (feed) => `last ${seconds(Math.round(feed.recent.window_s))}`;

export function totalBlocks(workers) {
  const total = { total: 0, free: 0, cached: 0, held: 0, leased: 0, quarantined: 0 };
  for (const { blocks } of workers) for (const name in total) total[name] += blocks[name];
  return total;
}

// [what, all, in the last minute]
export function counts(node, items, window_s) {
  fill(node, items, () =>
    items.map(([name, all, recent]) =>
      element(
        "div",
        { class: all ? "" : "zero" },
        element("dt", {}, name),
        element(
          "dd",
          {},
          typeof all === "string" ? all : count(all),
          recent ? element("small", { title: `in the last ${seconds(window_s)}` }, ` +${count(recent)}`) : null,
        ),
      ),
    ),
  );
}
