// Charts by hand: an area of the last minutes, a histogram, a row of parts.

import { element, shape } from "./dom.js";
import { count, seconds } from "./format.js";

// `values` may have nulls. Time runs to the right; the newest is at the right edge.
export function sparkline(values, label) {
  const length = Math.max(60, values.length);
  const known = values.filter((value) => value !== null);
  const top = Math.max(...known, 1e-9) * 1.08;
  const x = (index) => ((length - values.length + index) / (length - 1)) * 100;
  const points = values
    .map((value, index) => (value === null ? null : `${x(index).toFixed(2)},${(28 - (27 * value) / top).toFixed(2)}`))
    .filter(Boolean);
  const svg = shape("svg", {
    class: "spark",
    viewBox: "0 0 100 28",
    height: 28,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": label,
  });
  if (points.length > 1) {
    const [first, last] = [points[0].split(",")[0], points.at(-1).split(",")[0]];
    svg.append(
      shape("polygon", { class: "area", points: `${first},28 ${points.join(" ")} ${last},28` }),
      shape("polyline", { class: "stroke", points: points.join(" ") }),
    );
  }
  return svg;
}

const WIDTH = 340,
  HEIGHT = 92,
  FOOT = 16;

// `bounds` in seconds; `counts` up to each of them, the last of all; `p50` and `p99` in seconds, or null.
export function histogram({ bounds, counts, p50, p99 }, title) {
  const each = counts.map((number, index) => number - (index ? counts[index - 1] : 0));
  const top = Math.max(...each, 1);
  const step = WIDTH / each.length;
  const position = (value) => {
    // in buckets
    const index = bounds.findIndex((bound) => value <= bound);
    if (index < 0) return each.length;
    const low = index ? bounds[index - 1] : bounds[0] / 2;
    return index + Math.max(0, Math.log(value / low) / Math.log(bounds[index] / low));
  };
  const svg = shape("svg", {
    class: "histogram",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": describe(bounds, each, title),
  });
  each.forEach((number, index) => {
    const height = number ? Math.max(1.5, ((HEIGHT - FOOT - 14) * number) / top) : 0;
    const range = index < bounds.length ? `up to ${seconds(bounds[index])}` : `above ${seconds(bounds.at(-1))}`;
    svg.append(
      shape(
        "rect",
        { x: index * step + 1, y: HEIGHT - FOOT - height, width: step - 2, height, rx: 1.5 },
        shape("title", {}, `${range}: ${count(number)}`),
      ),
    );
  });
  svg.append(shape("line", { x1: 0, x2: WIDTH, y1: HEIGHT - FOOT, y2: HEIGHT - FOOT }));
  bounds.forEach((bound, index) => {
    if (Number.isInteger(Math.log10(bound)) || Math.abs(Math.log10(bound) - Math.round(Math.log10(bound))) < 1e-9)
      svg.append(shape("text", { x: (index + 1) * step, y: HEIGHT - 4, "text-anchor": "middle" }, seconds(bound)));
  });
  for (const [name, value] of Object.entries({ p50, p99 })) {
    if (value === null) continue;
    const x = position(value) * step;
    svg.append(
      shape("line", { class: "quantile", x1: x, x2: x, y1: 11, y2: HEIGHT - FOOT }),
      shape("text", { class: "quantile", x, y: 9, "text-anchor": x > WIDTH - 20 ? "end" : "middle" }, name),
    );
  }
  return svg;
}

function describe(bounds, each, title) {
  const parts = each
    .map((number, index) =>
      number
        ? `${count(number)} ${index < bounds.length ? "up to" : "above"} ${seconds(bounds[Math.min(index, bounds.length - 1)])}`
        : "",
    )
    .filter(Boolean);
  return `${title}: ${parts.join(", ") || "nothing yet"}`;
}

// `parts`: [name, number] of `whole`.
export function stack(parts, whole, label) {
  const there = parts.filter(([, number]) => number > 0);
  return element(
    "div",
    { class: "stack", role: "img", "aria-label": label, title: label },
    there.map(([name, number]) =>
      element("i", { "data-part": name, width_percent: (100 * number) / Math.max(whole, 1) }),
    ),
  );
}
