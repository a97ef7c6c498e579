// How long clients wait, as histograms.

import { histogram } from "./charts.js";
import { at, element, fill } from "./dom.js";
import { count, seconds } from "./format.js";
import { period } from "./figures.js";

export function latencies(feed) {
  const recent = document.querySelector("[name=period]:checked").value === "recent";
  const names = [
    ["ttft", "To the first token"],
    ["itl", "From token to token"],
    ["request", "To the end of completed requests"],
  ];
  if (!at("latencies").children.length)
    at("latencies").append(
      ...names.map(([, title]) =>
        element(
          "article",
          { class: "latency" },
          element("h3", {}, title),
          element("p", { class: "summary" }),
          element("div"),
        ),
      ),
    );
  names.forEach(([name, title], index) => {
    const figures = (recent ? feed.recent : feed).latencies[name];
    const [, summary, chart] = at("latencies").children[index].children;
    const number = figures.counts.at(-1);
    fill(summary, [figures, recent && period(feed)], () => [
      ...["p50", "p90", "p99"].flatMap((q) => [`${q} `, element("b", {}, seconds(figures[q])), " · "]),
      `${count(number)}${recent ? `, ${period(feed)}` : ""}`,
    ]);
    fill(chart, figures, () => histogram(figures, title));
  });
}
