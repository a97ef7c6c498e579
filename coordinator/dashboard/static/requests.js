// Requests on their way: how many are in each stage, and which have waited longest.

import { at, element, rows, say } from "./dom.js";
import { period, sum } from "./figures.js";
import { count, percent, seconds, some } from "./format.js";

const STAGES = [
  ["waiting", "No worker", "wait for one, or for a retry"],
  ["queued", "Queued", "at a worker, not begun"],
  ["prefill", "Prefill", ""],
  ["hand_over", "Hand-over", "first token out, KV on its way"],
  ["decode", "Decode", ""],
];

export function requests(feed) {
  const { stages, shown } = feed.on_their_way,
    done = feed.recent.requests;
  const computing = sum(feed.workers.map((worker) => worker.waiting_prefill_tokens));
  const notes = {
    prefill: `${some(computing, "token")} to compute`,
    decode: `${count(Math.round(feed.recent.tokens_per_s ?? 0))} tok/s`,
  };
  const items = STAGES.map(([name, title, note]) => [
    name,
    title,
    count(stages[name]),
    notes[name] ?? note,
    stages[name] ? "some" : "none",
  ]);
  items.push(["done", "Completed", count(done.completed ?? 0), period(feed), ""]);
  if (!at("stages").children.length)
    at("stages").append(
      ...items.map(([name]) =>
        element(
          "li",
          { "data-stage": name },
          ...["title", "value", "note"].map((part) => element("div", { class: part })),
        ),
      ),
    );
  items.forEach(([, title, value, note, kind], index) => {
    const item = at("stages").children[index];
    item.className = kind;
    [title, value, note].forEach((text, part) => say(item.children[part], text));
  });
  const all = sum(Object.values(stages));
  say(at("streams-more"), all > shown.length ? `(${shown.length} of ${count(all)})` : "");
  rows(at("streams").tBodies[0], shown, {
    key: (stream) => `${stream.id}/${stream.choice}`,
    kind: (stream) =>
      stream.stage === "waiting" ? "trouble bad" : (stream.silent_s ?? stream.age_s) > 5 ? "trouble" : "",
    none: "No request is on its way.",
    cells: (stream) => [
      {
        make: () => element("code", {}, `…${stream.id}${stream.choice ? ` [${stream.choice}]` : ""}`),
        key: stream.id,
      },
      {
        make: () =>
          element(
            "span",
            { class: "tag", "data-stage": stream.stage },
            STAGES.find(([name]) => name === stream.stage)[1].toLowerCase(),
          ),
        key: stream.stage,
      },
      { text: seconds(stream.age_s), as: "n" },
      { text: stream.silent_s === null ? `${seconds(stream.age_s)}, none yet` : seconds(stream.silent_s), as: "n" },
      {
        text: `${count(stream.prompt_tokens)}${stream.cached_tokens ? ` (${percent(stream.cached_tokens, stream.prompt_tokens)} cached)` : ""}`,
        as: "n",
      },
      {
        text: stream.tokens
          ? `${count(stream.tokens)} of ≤ ${count(stream.max_tokens)}`
          : stream.waiting_tokens
            ? `${count(stream.waiting_tokens)} to compute`
            : "–",
      },
      { text: stream.attempt, as: stream.attempt > 1 ? "n warn" : "n" },
      stream.prefill ?? (stream.decode ? "by decode" : "–"),
      stream.decode ?? "–",
      stream.tenant || "–",
    ],
  });
}
