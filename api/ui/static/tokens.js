// Tokens of an output: the text of each, its origin, and the tip that shows both.

import { announce, byId, element } from "./dom.js";

// A block of text ends at the first line break after BLOCK_TOKENS, or in a long line at the first space after MAX_LINE_TOKENS.
const BLOCK_TOKENS = 100;
const MAX_LINE_TOKENS = 2000;

const NAMES = { model: "the model", forced: "forced: only this token was permitted", grammar: "draft of grammar" };
const details = new WeakMap();

/** Divides the text of an output among its tokens, which arrive as bytes and may lack the rest of a character. */
export class TokenQueue {
  #decoder = new TextDecoder();
  #pending = [];

  /** Adds tokens, each with `bytes`, and the facts that the tip shows. */
  push(tokens) {
    for (const token of tokens) {
      const text = this.#decoder.decode(Uint8Array.from(token.bytes), { stream: true });
      this.#pending.push({ text, token });
    }
  }

  /** Drops tokens whose text is not shown. */
  clear() {
    this.#pending = [];
  }

  /** Returns the parts of `text`, each with its token. Tokens before `text`, such as tags, are dropped. If `text` is not
   * in the pending tokens, it is one part without a token. */
  take(text) {
    const joined = this.#pending.map((each) => each.text).join("");
    let skip = joined.startsWith(text) ? 0 : joined.lastIndexOf(text);
    if (skip < 0) return [{ text, token: null }];
    let rest = text.length;
    const parts = [];
    while (this.#pending.length && (rest > 0 || this.#pending[0].text === "")) {
      const first = this.#pending[0];
      const start = Math.min(skip, first.text.length);
      const shown = first.text.slice(start, start + rest);
      skip -= start;
      rest -= shown.length;
      if (start < first.text.length || first.text === "") parts.push({ text: shown, token: first.token });
      if (start + shown.length < first.text.length) {
        first.text = first.text.slice(start + shown.length);
        break;
      }
      this.#pending.shift();
    }
    return parts;
  }
}

/** An element to which the text of an output is appended. It is divided into blocks, and the browser lays out only those
 * in view, so that the cost of a token does not grow with the text before it. */
export class TokenText {
  element = element("div", { className: "text" });
  #block = null;
  #tokens = 0;
  #isLineEnd = false;

  /** Appends the parts of a text, each with its token. */
  append(parts) {
    for (const part of parts) {
      const isFull = this.#isLineEnd ? this.#tokens >= BLOCK_TOKENS : this.#tokens >= MAX_LINE_TOKENS && /^\s/.test(part.text);
      if (!this.#block || isFull) {
        this.#block = element("div", { className: "block" });
        this.#tokens = 0;
        this.element.append(this.#block);
      }
      this.#block.append(tokenElement(part));
      this.#tokens += 1;
      if (part.text) this.#isLineEnd = part.text.endsWith("\n");
    }
  }
}

function tokenElement({ text, token }) {
  if (token === null) return document.createTextNode(text);
  const span = element("span", { className: "token", data: { origin: token.origin } }, text);
  details.set(span, token);
  return span;
}

/** Returns a label with the colour of an origin. */
export function originChip(origin, text, data = {}) {
  return element("span", { className: "chip", data: { origin, ...data } }, text);
}

/** Returns the tokens by origin, with the number of each, as elements. */
export function originChips(counts) {
  const chips = [...counts].map(([origin, number]) => originChip(origin, `${origin} ${number}`, { count: number }));
  return element("span", { className: "chips facts" }, ...chips);
}

/** Shows the tip of tokens under the pointer, of tapped tokens, and of those that the arrow keys select. */
export function enableTips(container) {
  const show = (event) => showTip(event.target.closest?.(".token"));
  container.addEventListener("pointerover", show);
  container.addEventListener("click", show);
  container.addEventListener("pointerleave", () => showTip(null));
  container.addEventListener("focusout", () => select(container, null));
  container.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.target.matches("textarea, input")) return;
    const tokens = [...container.querySelectorAll(".token")].filter((each) => each.textContent);
    const at = tokens.findIndex((each) => each.classList.contains("selected"));
    const next = at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step;
    if (!tokens[next]) return;
    event.preventDefault();
    select(container, tokens[next]);
  });
}

function select(container, token) {
  container.querySelector(".token.selected")?.classList.remove("selected");
  token?.classList.add("selected");
  token?.scrollIntoView({ block: "nearest" });
  showTip(token);
  if (token) announce(byId("tip").textContent);
}

function showTip(target) {
  const tip = byId("tip");
  const token = target && document.body.classList.contains("origins") ? details.get(target) : undefined;
  tip.hidden = !token;
  if (!token) return;
  const chance = token.logprob === undefined ? [] : [`logprob ${token.logprob.toFixed(2)}`];
  const origin = NAMES[token.origin] ?? `draft of ${token.origin}`;
  tip.textContent = [JSON.stringify(token.token), origin, ...chance, `${Math.round(token.milliseconds)} ms`].join(" · ");
  const box = target.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 6 ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
}
