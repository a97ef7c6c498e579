// Asks for the figures once a second while somebody can see them. One question at a time; each has a deadline.

const EVERY_MS = 1000,
  PATIENCE_MS = 5000,
  LATER_MS = 3000;
const KEY = "baton-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

export const path = (rest) => new URL(rest, document.baseURI);
export const authorization = () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {});

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The answer's JSON, or what its error says.
export async function said(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok)
    throw new Refusal(response.status, body.error?.message ?? `the coordinator answers ${response.status}`);
  return body;
}

export class Poll {
  #timer = 0;
  #asking = null;
  #on;
  paused = false;

  // `on`: figures(feed), refused(Refusal), silent(Error).
  constructor(on) {
    this.#on = on;
    document.addEventListener("visibilitychange", () => this.again());
  }

  again(after = 0) {
    clearTimeout(this.#timer);
    if (!this.paused && !document.hidden) this.#timer = setTimeout(() => this.#ask(), after);
  }

  async #ask() {
    if (this.#asking) return;
    const begun = performance.now();
    let next = EVERY_MS;
    const headers = authorization();
    const signal = AbortSignal.timeout(PATIENCE_MS);
    this.#asking = fetch(path("dashboard/feed"), { headers, cache: "no-store", signal }).then(said);
    const [feed, error] = await this.#asking.then(
      (feed) => [feed, null],
      (error) => [null, error],
    );
    this.#asking = null;
    if (error instanceof Refusal && (error.status === 401 || error.status === 403)) {
      next = null; // asking again with the same key says the same
      this.#on.refused(error);
    } else if (error) {
      next = LATER_MS;
      this.#on.silent(error);
    }
    if (next !== null) this.again(Math.max(100, next - (performance.now() - begun)));
    if (feed && !this.paused) this.#on.figures(feed);
  }
}
