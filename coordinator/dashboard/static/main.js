// Joins the parts: views, theme, key, and the figures as they come.

import { cluster } from "./cluster.js";
import { at, fill, element, say } from "./dom.js";
import { seconds } from "./format.js";
import { Playground } from "./playground.js";
import { key, Poll } from "./poll.js";

const STALE_MS = 3500;
const playground = new Playground();
let heardAt = null,
  refusedNow = false;

const poll = new Poll({
  figures(feed) {
    heardAt = performance.now();
    refusedNow = false;
    at("refused").hidden = true;
    show(view());
    cluster(feed);
    header(feed);
    pulse();
  },
  refused(refusal) {
    refusedNow = true;
    say(
      at("refused-why"),
      key.get()
        ? `With this key the coordinator says: ${refusal.message}.`
        : `The coordinator says: ${refusal.message}.`,
    );
    show(view());
    pulse();
  },
  silent: pulse,
});

function header(feed) {
  document.title = `${feed.alerts.some((alert) => alert.level === "bad") ? "✕ " : ""}Baton · ${feed.model}`;
  fill(at("facts"), [feed.model, feed.state, feed.routing.policy, seconds(feed.at - feed.started)], () => [
    element("b", {}, feed.model),
    ` · ${feed.state} · up ${seconds(feed.at - feed.started)} · routed by ${feed.routing.policy.replaceAll("_", " ")}`,
  ]);
  say(at("build"), `baton ${feed.version}`);
}

function pulse() {
  const silentMs = heardAt === null ? 0 : performance.now() - heardAt;
  const stale = !poll.paused && !refusedNow && !document.hidden && silentMs > STALE_MS;
  const state = poll.paused
    ? "paused"
    : refusedNow
      ? "refused"
      : stale
        ? "stale"
        : heardAt === null
          ? "waiting"
          : "live";
  const line =
    { paused: "paused", refused: "no access", waiting: "connecting", live: "live" }[state] ??
    `no answer for ${seconds(Math.round(silentMs / 1000))}`;
  at("pulse").dataset.state = state;
  say(at("pulse"), line);
  at("cluster").classList.toggle("stale", stale);
}
setInterval(pulse, 1000);

// Views

const VIEWS = ["cluster", "playground"];
const view = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "cluster");

function show(name) {
  for (const each of VIEWS) {
    const tab = at(`tab-${each}`),
      chosen = each === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    at(each).hidden = !chosen || (each === "cluster" && refusedNow);
  }
  at("refused").hidden = !(refusedNow && name === "cluster");
  if (name === "playground") playground.open();
}

for (const name of VIEWS) at(`tab-${name}`).addEventListener("click", () => (location.hash = name));
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -VIEWS.length, End: VIEWS.length }[event.key];
  if (!step) return;
  event.preventDefault();
  const index = VIEWS.indexOf(view()) + step;
  const wanted = Math.abs(step) > 1 ? (step < 0 ? 0 : VIEWS.length - 1) : (index + VIEWS.length) % VIEWS.length;
  location.hash = VIEWS[wanted];
  at(`tab-${VIEWS[wanted]}`).focus();
});
addEventListener("hashchange", () => show(view()));

// Pause, theme, key

at("pause").addEventListener("click", () => {
  poll.paused = !poll.paused;
  at("pause").setAttribute("aria-pressed", poll.paused);
  poll.again();
  pulse();
});

const THEME = "baton-theme";
function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  at("theme").value = name;
}
setTheme(localStorage.getItem(THEME) ?? "");
at("theme").addEventListener("change", (event) => {
  localStorage.setItem(THEME, event.target.value);
  setTheme(event.target.value);
});

const dialog = at("key-dialog");
function askForKey() {
  at("key").value = "";
  at("key-forget").hidden = !key.get();
  dialog.showModal();
}
function useKey(text) {
  key.set(text);
  dialog.close();
  at("key").value = "";
  playground.forget();
  poll.again();
  show(view());
}
at("key-open").addEventListener("click", askForKey);
at("refused-key").addEventListener("click", askForKey);
at("key-cancel").addEventListener("click", () => dialog.close());
at("key-forget").addEventListener("click", () => useKey(""));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
});
playground.onNeedsKey = askForKey;

show(view());
poll.again();
