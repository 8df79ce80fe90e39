// The chat: a conversation with streaming, stop, regenerate, and edits of earlier messages.

import { Answer } from "./answer.js";
import { announce, button, byId, copyText, element, setText } from "./dom.js";
import { BASE, eventsOf, needsKey, request } from "./server.js";
import { requestFields, systemPrompt } from "./settings.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { enableTips } from "./tokens.js";

const PATH = "v1/chat/completions";

let model = "";
let turns = []; // messages of the conversation, each with its element and, if the model wrote it, its answer
let edited = null; // turn of the user that the next message replaces, together with all later turns
let running = null; // controller of the running request
let isFollowing = true; // whether the list of messages stays scrolled to its end as it grows
let lastTop = 0; // scroll position at the last scroll event
let isFrameRequested = false;
// Maximum characters of an answer that screen readers announce.
const ANNOUNCED_CHARS = 2000;

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
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running) running.abort();
    else if (edited) endEdit();
  });
  byId("cancel-edit").addEventListener("click", endEdit);
  byId("messages").addEventListener("scroll", noteScroll);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("regenerate").addEventListener("click", regenerate);
  byId("new-chat").addEventListener("click", clear);
  byId("show-origins").addEventListener("change", showOrigins);
  for (const each of document.querySelectorAll(".snippet button")) {
    const shown = each.parentElement.querySelector("pre");
    each.addEventListener("click", () => copyText(shown.textContent, shown));
  }
  enableTips(byId("messages"));
  showOrigins();
}

function showOrigins() {
  document.body.classList.toggle("origins", byId("show-origins").checked);
}

function send() {
  const text = byId("input").value.trim();
  const results = edited ? [] : (turns.at(-1)?.answer?.results() ?? []);
  if (running || (!text && !results.length)) return;
  if (edited) removeTurns(turns.indexOf(edited));
  results.forEach((message) => addTurn(message, `Result: ${message.content}`));
  if (text) addTurn({ role: "user", content: text }, text);
  endEdit();
  generate();
}

function addTurn(message, text) {
  const shown = element("div", { className: "text" }, text);
  const turn = { message, item: element("li", { className: "user" }, shown) };
  const actions = [button("Copy", () => copyText(message.content, shown))];
  if (message.role === "user") actions.push(button("Edit", () => edit(turn)));
  turn.item.append(element("p", { className: "actions" }, ...actions));
  byId("messages").append(turn.item);
  turns.push(turn);
}

function edit(turn) {
  edited = turn;
  byId("editing").hidden = false;
  byId("input").value = turn.message.content;
  byId("input").focus();
}

function endEdit() {
  byId("input").value = "";
  edited = null;
  byId("editing").hidden = true;
}

/** Removes the turns from an index on, and all error messages. */
function removeTurns(index) {
  turns.splice(index).forEach(({ item }) => item.remove());
  byId("messages").querySelectorAll("[role=alert]").forEach((item) => item.remove());
}

function regenerate() {
  if (running) return;
  removeTurns(turns.at(-1)?.answer ? turns.length - 1 : turns.length);
  if (turns.length) generate();
}

function clear() {
  running?.abort();
  turns = [];
  endEdit();
  byId("messages").replaceChildren();
  byId("regenerate").hidden = true;
  byId("input").focus();
}

async function generate() {
  const answer = new Answer();
  isFollowing = true;
  const controller = (running = new AbortController());
  const turn = { message: answer.message, item: answer.item, answer };
  showRunning(true);
  let note = "";
  try {
    const body = requestBody();
    showRequest(body);
    byId("messages").append(answer.item);
    followInNextFrame();
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
    announce(answer.message.content.slice(0, ANNOUNCED_CHARS) || "The answer is complete.");
  }
  showRunning(false);
  followInNextFrame();
}

async function stream(body, answer, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(PATH, { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const chunk of eventsOf(response)) {
    answer.add(chunk);
    followInNextFrame();
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

/** Shows Stop in the place of Send while a request runs. The focus moves from one button to the other. */
function showRunning(isRunning) {
  const [shown, gone] = isRunning ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const isFocused = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (isFocused) shown.focus();
  byId("regenerate").hidden = isRunning || !turns.length;
}

function showError(error) {
  byId("messages").append(element("li", { role: "alert" }, error.message));
}

/** Stops following the end of the messages when the user scrolls up, and resumes when the user returns to the end. */
function noteScroll() {
  const { scrollHeight, scrollTop, clientHeight } = byId("messages");
  const isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
  if (scrollTop < lastTop || isAtEnd) isFollowing = isAtEnd;
  lastTop = scrollTop;
}

/** Scrolls to the end once a frame, not once an event: each read of the height makes the browser lay out the answer. */
function followInNextFrame() {
  if (isFrameRequested || !isFollowing) return;
  isFrameRequested = true;
  requestAnimationFrame(() => {
    isFrameRequested = false;
    if (isFollowing) byId("messages").scrollTop = byId("messages").scrollHeight;
  });
}

function showRequest(body) {
  const url = new URL(PATH, BASE).href;
  byId("no-request").hidden = true;
  byId("snippets").hidden = false;
  setText(byId("curl"), curlCommand(url, body, needsKey()));
  setText(byId("python"), pythonProgram(url, body, needsKey()));
}
