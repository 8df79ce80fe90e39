// One answer of the model: its reasoning, text and calls, as they arrive.

import { button, copyText, count, decimal, element } from "./dom.js";
import { TokenQueue, TokenText, originChips } from "./tokens.js";

/** The answer to one request, as a message of the conversation and as an element of the page. */
export class Answer {
  message = { role: "assistant", content: "" };
  #queue = new TokenQueue();
  #started = performance.now();
  #origins = new Map();
  #text = new TokenText();
  #reasoning = null;
  #calls = [];
  #last = {};

  constructor() {
    this.item = element("li", { className: "assistant", ariaBusy: "true" }, this.#text.element);
  }

  /** Adds one event of the stream. Throws an error that the event reports. */
  add(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    for (const name of ["usage", "timings"]) if (chunk[name]) this.#last[name] = chunk[name];
    const choice = chunk.choices[0];
    if (!choice) return;
    this.#count(choice);
    const { reasoning_content: reasoning, content, tool_calls: calls } = choice.delta;
    if (reasoning) this.#addReasoning(reasoning);
    if (content) this.#addContent(content);
    if (calls) calls.forEach((call) => this.#addCall(call));
    if (choice.finish_reason) this.#last.reason = choice.finish_reason;
  }

  /** Ends the answer. `note` says why it is incomplete; empty if it is complete. */
  end(note) {
    this.item.ariaBusy = "false";
    const reason = this.#last.reason === "length" ? "cut at the token limit" : "";
    this.item.append(this.#facts(note || reason));
    const copy = button("Copy", () => copyText(this.message.content, this.#text.element));
    this.item.append(element("p", { className: "actions" }, originChips(this.#origins), copy));
  }

  /** Returns the results that the user entered for the calls, as messages. */
  results() {
    return this.#calls.map(({ call, result }) => ({ role: "tool", tool_call_id: call.id, content: result.value }));
  }

  #count(choice) {
    const logprobs = choice.logprobs?.content ?? [];
    const milliseconds = performance.now() - this.#started;
    const tokens = (choice.token_origins ?? []).map((token, index) => ({
      ...token,
      logprob: logprobs[index]?.logprob,
      milliseconds,
    }));
    for (const { origin } of tokens) this.#origins.set(origin, (this.#origins.get(origin) ?? 0) + 1);
    this.#queue.push(tokens);
  }

  #addContent(text) {
    this.message.content += text;
    this.#text.append(this.#queue.take(text));
  }

  #addReasoning(text) {
    if (!this.#reasoning) {
      this.#reasoning = new TokenText();
      const summary = element("summary", {}, "Reasoning");
      this.item.prepend(element("details", { className: "reasoning" }, summary, this.#reasoning.element));
      this.message.reasoning_content = "";
    }
    this.message.reasoning_content += text;
    this.#reasoning.append(this.#queue.take(text));
  }

  #addCall({ index, id, function: part }) {
    this.#queue.clear();
    if (!this.#calls[index]) {
      const call = { id, type: "function", function: { name: part.name, arguments: "" } };
      const shown = element("pre");
      const result = element("textarea", { rows: 2, ariaLabel: `Result of ${part.name}` });
      const summary = element("summary", {}, `Call of ${part.name}`);
      const hint = element("p", { className: "hint" }, "Result, for the next message:");
      this.item.append(element("details", { className: "call" }, summary, shown, hint, result));
      this.#calls[index] = { call, shown, result };
      this.message.tool_calls = this.#calls.map((each) => each.call);
    }
    const { call, shown } = this.#calls[index];
    call.function.arguments += part.arguments ?? "";
    shown.textContent = call.function.arguments;
  }

  #facts(note) {
    const { usage, timings } = this.#last;
    const drafted = usage?.completion_tokens_details;
    const texts = [
      note,
      usage && `${count(usage.completion_tokens)} tokens`,
      timings && `${decimal(timings.predicted_per_second)} tokens/s`,
      timings && `${Math.round(timings.prompt_ms)} ms for ${count(timings.prompt_n)} prompt tokens`,
      timings?.cache_n && `${count(timings.cache_n)} cached`,
      drafted?.accepted_prediction_tokens &&
        `${count(drafted.accepted_prediction_tokens)} of ${count(drafted.accepted_prediction_tokens + drafted.rejected_prediction_tokens)} draft tokens accepted`,
    ];
    const spans = texts.filter(Boolean).map((text) => element("span", {}, text));
    const data = {
      tokens: usage?.completion_tokens ?? "",
      accepted: drafted?.accepted_prediction_tokens ?? "",
    };
    return element("p", { className: "facts", data }, ...spans);
  }
}
