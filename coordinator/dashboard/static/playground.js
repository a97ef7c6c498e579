// A chat over the public API, as any client has it: streamed, stopped by hanging up. Kept in this tab's memory alone.

import { at, element, fill, say } from "./dom.js";
import { count, seconds, some } from "./format.js";
import { authorization, path, said } from "./poll.js";

const MAX_SHOWN = 200; // messages

export class Playground {
  #messages = [];
  #going = null;
  #opened = false;
  onNeedsKey = () => {};

  constructor() {
    at("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    at("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#send();
      }
    });
    at("playground").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#stop();
    });
    at("stop").addEventListener("click", () => this.#stop());
    at("clear").addEventListener("click", () => {
      this.#stop();
      this.#messages = [];
      at("messages").replaceChildren();
      at("question").focus();
    });
  }

  // The models are asked for when the view is first seen: whoever may not see the figures may still chat.
  async open() {
    if (this.#opened) return;
    this.#opened = true;
    try {
      const { data } = await fetch(path("v1/models"), { headers: authorization() }).then(said);
      fill(at("model"), data, () => data.map(({ id }) => element("option", { value: id }, id)));
      this.#status("");
    } catch (error) {
      this.#opened = false;
      this.#status(error.message);
      if (error.status === 401) this.onNeedsKey();
    }
  }

  // Another key may have other models.
  forget() {
    this.#opened = false;
  }

  #status(text) {
    say(at("chat-status"), text);
  }

  #stop() {
    this.#going?.abort();
  }

  async #send() {
    const question = at("question").value.trim();
    if (!question || this.#going) return;
    at("question").value = "";
    this.#messages.push({ role: "user", content: question });
    this.#add("You", question);
    const answer = this.#add(at("model").value || "Model", "");
    const going = (this.#going = new AbortController());
    this.#busy(true);
    answer.text.classList.add("going");
    const times = { asked: performance.now(), first: null, last: null, pieces: 0, tokens: null };
    let text = "",
      end = "";
    try {
      for await (const piece of this.#stream(going.signal, times)) {
        text += piece;
        answer.text.append(piece);
        this.#follow();
      }
    } catch (error) {
      end = going.signal.aborted ? "stopped" : error.message;
      if (error.status === 401) this.onNeedsKey();
    }
    answer.text.classList.remove("going");
    if (text) this.#messages.push({ role: "assistant", content: text });
    else this.#messages.pop(); // a question without an answer is none to go on from
    answer.note.classList.toggle("bad", Boolean(end) && end !== "stopped");
    say(answer.note, [end, times.first === null ? "" : measured(times)].filter(Boolean).join(" · "));
    this.#status(end === "stopped" ? "Stopped." : end ? `It failed: ${end}` : "The answer is complete.");
    this.#going = null;
    this.#busy(false);
    this.#follow();
    at("question").focus();
  }

  async *#stream(signal, times) {
    const body = {
      model: at("model").value || undefined,
      messages: this.#messages,
      stream: true,
      stream_options: { include_usage: true },
    };
    for (const [field, id] of [
      ["max_tokens", "max-tokens"],
      ["temperature", "temperature"],
      ["seed", "seed"],
    ])
      if (at(id).value !== "") body[field] = Number(at(id).value);
    const headers = { "Content-Type": "application/json", ...authorization() };
    const response = await fetch(path("v1/chat/completions"), {
      method: "POST",
      headers,
      body: JSON.stringify(body),
      signal,
    });
    if (!response.ok) await said(response);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      if (event.usage) times.tokens = event.usage.completion_tokens;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      times.last = performance.now();
      times.first ??= times.last;
      times.pieces += 1;
      yield piece;
    }
  }

  #add(who, content) {
    const text = element("div", { class: "said" }, content),
      note = element("p", { class: "note" });
    const list = at("messages");
    list.append(
      element("li", { class: who === "You" ? "user" : "model" }, element("p", { class: "who" }, who), text, note),
    );
    while (list.children.length > MAX_SHOWN) list.firstElementChild.remove();
    this.#follow();
    return { text, note };
  }

  #follow() {
    at("messages").scrollTop = at("messages").scrollHeight;
  }

  #busy(busy) {
    at("send").disabled = busy;
    at("stop").disabled = !busy;
    if (busy) this.#status("The answer is coming.");
  }
}

function measured({ asked, first, last, pieces, tokens }) {
  const rate = last > first ? ` · ${count(((tokens ?? pieces) - 1) / ((last - first) / 1000))} tok/s` : "";
  return `first token after ${seconds((first - asked) / 1000)} · ${some(tokens ?? pieces, "token")}${rate}`;
}

// The data of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the connection broke before the end of the answer");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
