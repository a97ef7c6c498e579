// Workers as a table, in trouble first; where their KV is, and the lanes between them.

import { stack } from "./charts.js";
import { at, element, fill, rows, say } from "./dom.js";
import { BLOCKS, byName, counts, deaths, period, role, sum, totalBlocks } from "./figures.js";
import { bytes, count, percent, seconds, some, words } from "./format.js";

const SOURCES = [
  ["computed", "computed"],
  ["cached", "prefix cache"],
  ["loaded", "tiers"],
  ["fetched", "another's cache"],
  ["received", "handed over"],
];

export function workers(feed) {
  const wanted = at("filter").value.trim().toLowerCase();
  const there = new Set(feed.workers.map((worker) => worker.id));
  const gone = new Map(); // the latest loss of each
  for (const loss of deaths(feed)) if (!there.has(loss.worker) && !gone.has(loss.worker)) gone.set(loss.worker, loss);
  const lost = [...gone.values()].map((loss) => ({ id: loss.worker, roles: loss.roles, lost: loss }));
  const order = (worker) => (worker.lost ? 0 : worker.state !== "ready" || worker.breaker !== "closed" ? 1 : 2);
  const items = [...lost, ...feed.workers]
    .filter(
      (worker) =>
        !wanted ||
        [worker.id, role(worker), stateOf(worker, feed)[1], worker.model_version, worker.address].some((text) =>
          text?.toLowerCase().includes(wanted),
        ),
    )
    .sort((one, other) => order(one) - order(other) || byName(role(other), role(one)) || byName(one.id, other.id));
  const pools = ["prefill", "mixed", "decode"]
    .map((name) => [name, feed.workers.filter((worker) => role(worker) === name)])
    .filter(([, members]) => members.length);
  const summary = pools.map(([name, members]) => [
    name,
    members.length,
    sum(members.map((worker) => worker.running)),
    sum(members.map((worker) => worker.waiting)),
  ]);
  if (feed.num_workers > feed.workers.length) summary.push(["not shown", feed.num_workers - feed.workers.length, 0, 0]);
  fill(at("pools"), summary, () =>
    summary.map(([name, number, running, waiting]) =>
      element(
        "li",
        {},
        element("b", {}, `${count(number)} ${name}`),
        ` ${count(running)} running, ${count(waiting)} waiting`,
      ),
    ),
  );
  rows(at("workers").tBodies[0], items, {
    key: (worker) => `${worker.id}${worker.lost ? "/lost" : ""}`,
    kind: (worker) => (worker.lost ? "trouble bad" : order(worker) === 1 ? "trouble" : ""),
    none: wanted
      ? "No worker matches."
      : "No worker is connected. Start some with baton prefill, decode or mixed --coordinator …",
    cells: (worker) => {
      const [mark, state, level] = stateOf(worker, feed);
      const cell = {
        make: () => [element("em", { class: `mark ${level}`, "aria-hidden": true }, mark), state],
        key: [mark, state, level],
      };
      if (worker.lost) return [worker.id, worker.roles.join("+"), cell, ...Array(10).fill("")];
      const { blocks, rates } = worker,
        used = blocks.held + blocks.leased + blocks.quarantined;
      const faults = sum(Object.values(worker.faults));
      const label = `${BLOCKS.map((name) => `${count(blocks[name])} ${name}`).join(", ")}, ${count(blocks.free)} free of ${some(blocks.total, "block")}`;
      return [
        {
          make: () => [worker.id, element("small", { title: `pid ${worker.pid}` }, ` ${worker.address}`)],
          key: [worker.id, worker.address, worker.pid],
        },
        role(worker),
        cell,
        {
          make: () =>
            stack(
              BLOCKS.map((name) => [name, blocks[name]]),
              blocks.total,
              label,
            ),
          key: blocks,
        },
        { text: percent(used, blocks.total), as: "n" },
        { text: count(worker.running), as: "n" },
        { text: count(worker.waiting), as: "n" },
        { text: rate(rates.prompt_tokens_computed), as: "n" },
        { text: rate(rates.generated_tokens), as: "n" },
        { text: worker.measured.step_s ? seconds(worker.measured.step_s) : "–", as: "n" },
        lanesOf(worker),
        {
          make: () =>
            element(
              "span",
              {
                title: Object.entries(worker.faults)
                  .map(([name, number]) => `${words(name)}: ${number}`)
                  .join("\n"),
              },
              count(faults),
            ),
          key: worker.faults,
          as: faults ? "n warn" : "n muted",
        },
        worker.model_version,
      ];
    },
  });
}

function stateOf(worker, feed) {
  if (worker.lost) return ["✕", `lost ${seconds(Math.round(feed.at - worker.lost.at))} ago`, "bad"];
  if (worker.breaker === "open") return ["▲", "breaker open", "warn"];
  if (worker.breaker === "half_open") return ["▲", "probed", "warn"];
  if (worker.state === "draining") return ["◐", "draining", "warn"];
  return worker.state === "ready" ? ["●", "ready", "good"] : ["▲", worker.state, "warn"];
}

const rate = (value) => (value === null ? "–" : count(Math.round(value)));

function lanesOf(worker) {
  const lanes = {};
  for (const lane of Object.values(worker.lanes_in_use)) lanes[lane] = (lanes[lane] ?? 0) + 1;
  return (
    Object.entries(lanes)
      .map(([lane, number]) => (number > 1 ? `${lane} ×${number}` : lane))
      .join(", ") || "–"
  );
}

export function kv(feed) {
  const pools = ["prefill", "mixed", "decode"]
    .map((name) => [name, totalBlocks(feed.workers.filter((worker) => role(worker) === name))])
    .filter(([, blocks]) => blocks.total);
  const tiers = Object.entries(feed.totals.tiers);
  fill(at("kv"), [pools, tiers], () => [
    ...pools.map(([name, blocks]) => {
      const text = BLOCKS.map((part) => [part, blocks[part]])
        .filter(([part, number]) => number || part === "held")
        .map(([part, number]) => `${percent(number, blocks.total)} ${part}`)
        .join(", ");
      return element(
        "div",
        { class: "kv-row" },
        element("span", {}, `${name} pool`),
        stack(
          BLOCKS.map((part) => [part, blocks[part]]),
          blocks.total,
          `${name} pool: ${text}`,
        ),
        element("span", { class: "muted" }, `${text} of ${some(blocks.total, "block")}`),
      );
    }),
    ...tiers.map(([name, tier]) => {
      const asked = tier.loaded + tier.misses;
      const state = tier.on >= 1 ? "" : tier.on > 0 ? "read-only somewhere, " : "off somewhere, ";
      const found = asked ? `, ${percent(tier.loaded, asked)} of ${some(asked, "block")} found` : "";
      const size = `${bytes(tier.bytes)} of ${bytes(tier.capacity_bytes)}`;
      return element(
        "div",
        { class: "kv-row" },
        element("span", {}, `${name} tier`),
        stack([["cached", tier.bytes]], tier.capacity_bytes, `${name} tier: ${size}`),
        element("span", { class: tier.on >= 1 ? "muted" : "warn" }, `${state}${size}${found}`),
      );
    }),
    ...(tiers.length
      ? []
      : [
          element(
            "p",
            { class: "muted" },
            "No worker has a tier below its pool (--host-kv-memory, --disk-kv-folder, --shared-kv-folder).",
          ),
        ]),
  ]);
}

export function sources({ recent }) {
  const parts = SOURCES.map(([name, title]) => [name, recent.work[`prompt_tokens_${name}`] ?? 0, title]);
  const all = sum(parts.map(([, number]) => number));
  say(at("source-period"), period({ recent }));
  fill(at("sources"), parts, () => {
    if (!all) return element("p", { class: "muted" }, "No prompt was computed.");
    const text = parts
      .filter(([, number]) => number)
      .map(([, number, title]) => `${percent(number, all)} ${title}`)
      .join(", ");
    return [
      stack(parts, all, text),
      element(
        "p",
        { class: "legend" },
        parts
          .filter(([, number]) => number)
          .flatMap(([name, number, title]) => [
            element("i", { class: "swatch", "data-part": name }),
            `${title} ${count(number)} tok (${percent(number, all)})`,
          ]),
      ),
    ];
  });
}

export function lanes(feed) {
  const found = new Map();
  for (const worker of feed.workers)
    for (const [peer, lane] of Object.entries(worker.lanes_in_use))
      found.set(lane, [...(found.get(lane) ?? []), `${worker.id} ← ${peer}`]);
  rows(
    at("lanes").tBodies[0],
    [...found].sort(([one], [other]) => byName(one, other)),
    {
      key: ([lane]) => lane,
      none: "No worker has taken blocks from another yet.",
      cells: ([lane, pairs]) => [
        lane,
        { text: count(pairs.length), as: "n" },
        {
          text:
            pairs.sort(byName).slice(0, 6).join(", ") +
            (pairs.length > 6 ? ` and ${count(pairs.length - 6)} more` : ""),
          as: "wrap",
        },
      ],
    },
  );
  const { work } = feed.recent,
    { faults } = feed.totals;
  const received = sum(feed.workers.map((worker) => worker.rates.handover_bytes_received ?? 0));
  counts(
    at("lane-counts"),
    [
      ["Blocks coming in", `${bytes(received)}/s`],
      [
        "While pulling",
        work.handover_seconds ? `${bytes(work.handover_bytes_received / work.handover_seconds)}/s` : "–",
      ],
      ["Fell back to a slower lane", faults.handover_lane_fallbacks, feed.recent.work.handover_lane_fallbacks],
      ["Blocks pulled once more", faults.handover_blocks_retried, feed.recent.work.handover_blocks_retried],
    ],
    feed.recent.window_s,
  );
}
