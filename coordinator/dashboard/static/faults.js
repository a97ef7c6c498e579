// What failed and what became of it, what was refused and why, and what the event log says.

import { stack } from "./charts.js";
import { at, element, fill, rows } from "./dom.js";
import { counts, failures, sum } from "./figures.js";
import { clock, count, percent, words } from "./format.js";

export function losses(feed) {
  rows(at("losses").tBodies[0], feed.losses.slice(0, 8), {
    key: (loss) => `${loss.worker}/${loss.at}`,
    none: "None since this coordinator was started.",
    cells: (loss) => {
      const completed = loss.ended.completed ?? 0,
        failed = failures(loss.ended);
      const other = loss.requests - loss.running - completed - failed;
      const parts = [
        ["completed", completed],
        ["running", loss.running],
        ["failed", failed],
        ["other", other],
      ];
      const text = [
        [completed, "completed elsewhere"],
        [loss.running, "going on"],
        [failed, "failed"],
        [other, "ended otherwise"],
      ]
        .filter(([number]) => number)
        .map(([number, what]) => `${count(number)} ${what}`)
        .join(", ");
      return [
        clock(loss.at),
        {
          make: () => [
            element("em", { class: `mark ${loss.died ? "bad" : "muted"}`, "aria-hidden": true }, loss.died ? "✕" : "○"),
            `${loss.worker} `,
            element("small", {}, loss.roles.join("+")),
          ],
          key: loss.worker,
        },
        { text: loss.died ? loss.reason : `left: ${loss.reason}`, as: "wrap" },
        loss.requests
          ? { make: () => [stack(parts, loss.requests, text), element("small", {}, text)], key: parts, as: "wrap" }
          : { text: "it had none", as: "muted" },
      ];
    },
  });
}

export function faults({ counters, totals, recent }) {
  const fault = (title, name) => [title, totals.faults[name], recent.work[name]];
  const failed = Object.entries(counters.attempts_failed)
    .filter(([, number]) => number)
    .map(([cause, number]) => [`Attempts abandoned: ${words(cause)}`, number, recent.attempts_failed[cause]]);
  counts(
    at("fault-counts"),
    [
      ["Attempts begun again", counters.attempts.again, recent.attempts.again],
      ...failed,
      ["Waited for any worker to return", counters.waits_for_worker[""], 0],
      ["Breakers opened", counters.breakers.opened ?? 0, recent.breakers.opened],
      ["Poison requests stopped", counters.quarantine.convicted, 0],
      ["Clients that came back", sum(Object.values(counters.resumed)), 0],
      fault("Hand-overs that ended early", "handover_failures"),
      fault("Prefilled by decode instead", "local_prefill_fallbacks"),
      fault("Blocks with wrong bytes", "handover_checksum_failures"),
      fault("Leases that expired", "handover_leases_expired"),
      fault("Peers lost by workers", "handover_peer_losses"),
      fault("Fetched prefixes that ended early", "prefix_fetches_failed"),
      fault("Tier blocks missed", "kv_loads_missed"),
      ["Clients hung up on: not reading", counters.slow_readers[""], 0],
    ],
    recent.window_s,
  );
}

export function outcomes({ counters, recent, pressure }) {
  const group = (title, name) =>
    Object.entries(counters[name]).map(([label, number]) => [`${title}${words(label)}`, number, recent[name]?.[label]]);
  const refused = group("Refused: ", "refused").concat(group("Predicted too late: ", "admission_refused"));
  counts(
    at("outcomes"),
    [...group("Ended: ", "requests"), ...(refused.length ? refused : [["Refused", 0, 0]])],
    recent.window_s,
  );
  fill(at("pressure"), pressure, () => [
    element("h3", {}, "Predicted wait of each class, as a share of its target"),
    ...Object.entries(pressure).map(([name, value]) =>
      element(
        "div",
        { class: "kv-row" },
        element("span", {}, name),
        element(
          "div",
          { class: value >= 0.9 ? "meter over" : "meter", role: "img", "aria-label": `${name}: ${percent(value, 1)}` },
          element("i", { width_percent: Math.min(100, 100 * value) }),
        ),
        element(
          "span",
          { class: value >= 0.9 ? "bad" : "muted" },
          value >= 0.9 ? `${percent(value, 1)}: refuses` : percent(value, 1),
        ),
      ),
    ),
  ]);
}

export function journal({ journal: lines }) {
  fill(at("journal"), lines, () =>
    lines.length
      ? lines.map(({ at: when, level, text, times }) =>
          element(
            "li",
            {},
            element("time", { datetime: new Date(when * 1000).toISOString() }, clock(when)),
            element(
              "span",
              { class: { warning: "warn", error: "bad", critical: "bad" }[level] ?? "muted" },
              { warning: "▲ ", error: "✕ ", critical: "✕ " }[level] ?? "",
              level,
            ),
            element("span", {}, times > 1 ? `${text} (×${times})` : text),
          ),
        )
      : element("li", { class: "muted" }, "Nothing yet."),
  );
}
