// The chat: a conversation with streaming, stop and regenerate.

import { Answer } from "./answer.js";
import { byId, element, setText } from "./dom.js";
import { BASE, eventsOf, needsKey, request } from "./server.js";
import { requestFields, systemPrompt } from "./settings.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { enableTips } from "./tokens.js";

const PATH = "v1/chat/completions";

let model = "";
let turns = []; // messages of the conversation, each with its element and, if the model wrote it, its answer
let running = null; // controller of the running request
let isFrameRequested = false;

/** Sets the model's name, which requests repeat. */
export function setModel(name) {
  model = name;
}

/** Connects the chat's controls. */
export function startChat() {
  const input = byId("input");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  byId("stop").addEventListener("click", () => running?.abort());
  byId("regenerate").addEventListener("click", regenerate);
  byId("new-chat").addEventListener("click", clear);
  byId("show-origins").addEventListener("change", showOrigins);
  for (const button of document.querySelectorAll(".snippet button")) button.addEventListener("click", copy);
  enableTips(byId("messages"));
  showOrigins();
}

function showOrigins() {
  document.body.classList.toggle("origins", byId("show-origins").checked);
}

function send() {
  const text = byId("input").value.trim();
  const results = turns.at(-1)?.answer?.results() ?? [];
  if (running || (!text && !results.length)) return;
  results.forEach((message) => addTurn(message, `Result: ${message.content}`));
  if (text) addTurn({ role: "user", content: text }, text);
  byId("input").value = "";
  generate();
}

function addTurn(message, text) {
  const item = element("li", { className: "user" }, element("div", { className: "text" }, text));
  byId("messages").append(item);
  turns.push({ message, item });
}

function regenerate() {
  if (running) return;
  const last = turns.at(-1);
  if (last?.answer) turns.pop().item.remove();
  byId("messages").querySelectorAll("[role=alert]").forEach((item) => item.remove());
  if (turns.length) generate();
}

function clear() {
  running?.abort();
  turns = [];
  byId("messages").replaceChildren();
  byId("regenerate").hidden = true;
  byId("input").focus();
}

async function generate() {
  const answer = new Answer();
  const controller = (running = new AbortController());
  const turn = { message: answer.message, item: answer.item, answer };
  showRunning(true);
  let note = "";
  try {
    const body = requestBody();
    showRequest(body);
    byId("messages").append(answer.item);
    await stream(body, answer, controller.signal);
  } catch (error) {
    note = controller.signal.aborted ? "stopped" : "failed";
    if (!controller.signal.aborted) showError(error);
  }
  running = null;
  const isEmpty = !answer.message.content && !answer.message.reasoning_content && !answer.message.tool_calls;
  if (note && isEmpty) {
    answer.item.remove();
  } else if (answer.item.isConnected) {
    answer.end(note);
    turns.push(turn);
  }
  showRunning(false);
  follow(true);
}

async function stream(body, answer, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(PATH, { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const chunk of eventsOf(response)) {
    followInNextFrame();
    answer.add(chunk);
  }
}

function requestBody() {
  const system = systemPrompt();
  const messages = turns.map((turn) => turn.message);
  return {
    ...(model && { model }),
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    ...requestFields(),
  };
}

function showRunning(isRunning) {
  byId("stop").hidden = !isRunning;
  byId("send").disabled = isRunning;
  byId("regenerate").hidden = isRunning || !turns.length;
}

function showError(error) {
  byId("messages").append(element("li", { role: "alert" }, error.message));
}

function isScrolledToEnd() {
  const list = byId("messages");
  return list.scrollHeight - list.scrollTop - list.clientHeight < 40;
}

function follow(isAtEnd) {
  if (isAtEnd) byId("messages").scrollTop = byId("messages").scrollHeight;
}

/** Scrolls once a frame, and not once an event: the browser lays out the whole answer for each look at its height. */
function followInNextFrame() {
  if (isFrameRequested) return;
  isFrameRequested = true;
  const isAtEnd = isScrolledToEnd();
  requestAnimationFrame(() => {
    isFrameRequested = false;
    follow(isAtEnd);
  });
}

function showRequest(body) {
  const url = new URL(PATH, BASE).href;
  byId("no-request").hidden = true;
  byId("snippets").hidden = false;
  setText(byId("curl"), curlCommand(url, body, needsKey()));
  setText(byId("python"), pythonProgram(url, body, needsKey()));
}

/** Copies a snippet, or selects it where the browser gives pages no access to the clipboard. */
async function copy(event) {
  const shown = event.target.parentElement.querySelector("pre");
  getSelection().selectAllChildren(shown);
  await navigator.clipboard?.writeText(shown.textContent).catch(() => undefined);
}
