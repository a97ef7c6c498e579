// Elements from data. Text goes in as text: no name of a worker, no model's answer is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const at = (id) => document.getElementById(id);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "width_percent")
      node.style.width = `${value}%`; // by script: the policy allows no style attribute
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const element = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
export const shape = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

// Replaces what is in a node, unless it is the same already: nothing jumps, and what a screen reader reads stays.
const shown = new WeakMap();
export function fill(node, key, make) {
  const text = JSON.stringify(key);
  if (shown.get(node) === text) return;
  shown.set(node, text);
  node.replaceChildren(...[make()].flat());
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Rows by key; a cell is its text, { text, as: its class }, or { make, key, as } as in `fill`. A row that stays keeps its element, and only cells that changed are written.
export function rows(body, items, { key, cells, kind = () => "", none }) {
  const old = new Map([...body.children].map((row) => [row.dataset.key, row]));
  const wanted = items.map((item) => {
    const id = key(item);
    const row = old.get(id) ?? element("tr", { "data-key": id });
    old.delete(id); // of two with one name the second gets a row of its own
    if (row.className !== kind(item)) row.className = kind(item);
    cells(item).forEach((cell, index) => {
      const content = cell instanceof Object ? cell : { text: cell };
      const td = row.children[index] ?? row.appendChild(element("td"));
      if (td.className !== (content.as ?? "")) td.className = content.as ?? "";
      if (content.make) fill(td, content.key, content.make);
      else {
        shown.delete(td);
        say(td, String(content.text));
      }
    });
    return row;
  });
  if (!wanted.length && none) {
    const columns = body.closest("table").tHead.rows[0].cells.length;
    wanted.push(element("tr", { "data-key": "" }, element("td", { colspan: columns, class: "empty wrap" }, none)));
  }
  const stay = new Set(wanted);
  for (const row of [...body.children]) if (!stay.has(row)) row.remove();
  wanted.forEach((row, index) => {
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
  });
}
