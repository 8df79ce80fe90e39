// Requests to the server from which the page comes, with an API key if the server asks for one.

import { byId } from "./dom.js";

// The folder of the page, so that the page also works below a path prefix.
export const BASE = new URL(".", document.baseURI);
const STORED_KEY = `paceline.key ${BASE.pathname}`;

let asking = null;

export const needsKey = () => "needsKey" in document.documentElement.dataset;
export const storedKey = () => localStorage.getItem(STORED_KEY) ?? "";

/** An error reply of the server. `share` is the loaded share of the model while the model loads. */
export class ServerError extends Error {
  constructor(status, info) {
    super(info?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.share = info?.progress;
  }
}

/** Returns the successful response for a path and fetch's options. Asks for a key before the first request if the
 * server needs one, and again after a 401. Throws ServerError for another error status. */
export async function request(path, options = {}) {
  if (needsKey() && !storedKey()) await askForKey("");
  for (;;) {
    const key = storedKey();
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(new URL(path, BASE), { ...options, headers });
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    if (response.status !== 401) throw new ServerError(response.status, body?.error);
    if (storedKey() === key) await askForKey(key && "The server does not know this key.");
  }
}

/** Shows the dialog until a key is given. Several callers share one dialog. */
function askForKey(problem) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-error").textContent = problem;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      localStorage.setItem(STORED_KEY, byId("key").value.trim());
      byId("key").value = "";
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
    dialog.showModal();
  });
  return asking;
}

/** Yields the data of each server-sent event of a response; `[DONE]` and comments are skipped. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: {")) yield JSON.parse(block.slice(6));
    }
  }
}
