// Figures as people read them.

const trim = (number) =>
  (Math.abs(number) >= 99.95
    ? number.toFixed(0)
    : Math.abs(number) >= 9.995
      ? number.toFixed(1)
      : number.toFixed(2)
  ).replace(/\.0+$/, "");

export function count(number) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  const size = Math.abs(number);
  if (size >= 1e9) return `${trim(number / 1e9)} G`;
  if (size >= 1e6) return `${trim(number / 1e6)} M`;
  if (size >= 1e4) return `${trim(number / 1e3)} k`;
  return Number.isInteger(number) || size >= 99.95 ? number.toFixed(0) : trim(number);
}

export function bytes(number) {
  if (number === null || number === undefined) return "–";
  for (const [unit, size] of [
    ["TiB", 2 ** 40],
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ])
    if (number >= size) return `${trim(number / size)} ${unit}`;
  return `${number.toFixed(0)} B`;
}

export function seconds(number) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  if (number < 0.0009995) return `${trim(number * 1e6)} µs`;
  if (number < 0.9995) return `${trim(number * 1e3)} ms`;
  if (number < 120) return `${trim(number)} s`;
  if (number < 7200) return `${(number / 60).toFixed(0)} min`;
  if (number < 172800) return `${(number / 3600).toFixed(0)} h`;
  return `${(number / 86400).toFixed(0)} d`;
}

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour12: false });
export const words = (name) => name.replaceAll("_", " ");
export const some = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;
