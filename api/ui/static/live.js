// The live view: a snapshot of the server each second while the page is visible.

import { setModel } from "./chat.js";
import { byId, bytes, count, decimal, element, percent, setText } from "./dom.js";
import { eventsOf, request } from "./server.js";
import { showDefaults } from "./settings.js";

const HISTORY_SECONDS = 180;
const RETRY_MS = 1000;

const history = [];
let controller = new AbortController();

/** Follows the server for ever. A hidden page reads nothing. */
export async function startLive() {
  document.addEventListener("visibilitychange", () => document.hidden && controller.abort());
  for (;;) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    controller = new AbortController();
    const isForbidden = await follow(controller.signal).catch(showLost);
    if (isForbidden) return;
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function follow(signal) {
  const response = await request("v1/paceline/events", { signal });
  byId("loading").hidden = true;
  byId("status").dataset.state = "connected";
  setText(byId("status"), "connected");
  request("props").then((reply) => reply.json()).then(showDefaults, () => undefined);
  for await (const snapshot of eventsOf(response)) {
    if (snapshot.error) throw new Error(snapshot.error.message);
    show(snapshot);
  }
  throw new Error("The server ended the stream.");
}

/** Shows why there are no snapshots. Returns true if the key may not read them, so that the chat is all there is. */
function showLost(error) {
  if (controller.signal.aborted) return false;
  const isLoading = error.share !== undefined;
  byId("loading").hidden = !isLoading;
  if (isLoading) {
    byId("loading").querySelector("progress").value = error.share;
    setText(byId("loading").querySelector("span"), percent(error.share, 1));
  }
  const isForbidden = error.status === 403;
  byId("status").dataset.state = isLoading ? "loading" : "lost";
  setText(byId("status"), isLoading ? "loading" : isForbidden ? "no live view with this key" : "not connected");
  return isForbidden;
}

function show(snapshot) {
  setModel(snapshot.model);
  setText(byId("model"), snapshot.model);
  history.push(snapshot);
  if (history.length > HISTORY_SECONDS) history.shift();
  setText(byId("rate"), decimal(snapshot.tokens_per_second));
  setText(byId("step"), decimal(snapshot.step_ms));
  setText(byId("running"), snapshot.running);
  setText(byId("waiting"), snapshot.waiting);
  const { prompt_tokens: prompt, cached_tokens: cached } = snapshot;
  setText(byId("prompts"), `${percent(cached, prompt)} of ${count(prompt)} prompt tokens were cached`);
  chart(byId("rate-chart"), history.map((each) => each.tokens_per_second ?? 0));
  chart(byId("step-chart"), history.map((each) => each.step_ms ?? 0));
  showKV(snapshot.kv);
  showProposers(snapshot.proposers.filter((each) => each.drafted));
  showSlots(snapshot.slots);
}

/** Draws a line from the left, with zero at the bottom and the maximum at the top. */
function chart(svg, values) {
  const namespace = "http://www.w3.org/2000/svg";
  svg.setAttribute("viewBox", `0 0 ${HISTORY_SECONDS} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  const top = Math.max(...values, 1e-9);
  const line = svg.firstChild ?? svg.appendChild(document.createElementNS(namespace, "polyline"));
  const start = HISTORY_SECONDS - values.length;
  line.setAttribute("points", values.map((value, x) => `${start + x},${(39 - (37 * value) / top).toFixed(1)}`).join(" "));
}

function showKV(kv) {
  const used = kv.cells_running + kv.cells_idle;
  const tiers = [
    [
      `${percent(used, kv.cells)} full: ${count(kv.cells_running)} tokens of running requests, ` +
        `${count(kv.cells_idle)} of earlier ones, room for ${count(kv.cells)}`,
      [kv.cells_running, kv.cells_idle],
      kv.cells,
    ],
    ["RAM", [kv.ram_bytes], kv.ram_capacity],
    ["Disk", [kv.disk_bytes], kv.disk_capacity],
  ];
  const rows = tiers.filter(([, , capacity]) => capacity).map(([label, parts, capacity], index) => {
    const text = index ? `${label}: ${bytes(parts[0])} of ${bytes(capacity)}` : label;
    const bars = parts.map((part) => {
      const bar = element("i");
      bar.style.width = `${(100 * part) / capacity}%`;
      return bar;
    });
    return element("div", { className: "tier" }, element("div", { className: "bar" }, ...bars), text);
  });
  byId("kv").replaceChildren(...rows);
}

function showProposers(proposers) {
  byId("proposers").hidden = !proposers.length;
  if (!proposers.length) return;
  const best = proposers.reduce((one, other) => (other.saved_seconds > one.saved_seconds ? other : one));
  const total = proposers.reduce((sum, each) => sum + each.saved_seconds, 0);
  const helped = best.saved_seconds > 0 ? ` ${best.type} helped most.` : "";
  setText(byId("saved"), `Drafts saved ${decimal(total)} s of steps so far.${helped}`);
  const rows = proposers.map((each) => {
    const name = element("span", { className: "chip", data: { origin: each.type } }, each.type);
    const texts = [count(each.drafted), count(each.accepted), percent(each.accepted, each.drafted)];
    const cells = [name, ...texts, `${decimal(each.saved_seconds)} s`].map((content) => element("td", {}, content));
    return element("tr", { data: { type: each.type } }, ...cells);
  });
  byId("proposers").tBodies[0].replaceChildren(...rows);
}

function showSlots(slots) {
  const body = byId("slots").tBodies[0];
  while (body.rows.length > slots.length) body.deleteRow(-1);
  while (body.rows.length < slots.length) body.append(slotRow());
  slots.forEach((slot, index) => {
    const row = body.rows[index];
    row.dataset.state = slot.state;
    const limit = slot.max_tokens === null ? "" : ` / ${count(slot.max_tokens)}`;
    const texts = [slot.id, slot.state, null, `${count(slot.emitted)}${limit}`, decimal(slot.tokens_per_second)];
    texts.push(slot.draft || "–", percent(slot.accepted, slot.drafted));
    texts.forEach((text, column) => text !== null && setText(row.cells[column], text));
    const [bar, label] = row.cells[2].children;
    bar.hidden = !slot.prompt;
    bar.max = slot.prompt || 1;
    bar.value = slot.processed;
    setText(label, slot.prompt ? ` ${count(slot.processed)} / ${count(slot.prompt)}` : "");
  });
}

function slotRow() {
  const progress = element("progress", { value: 0, ariaLabel: "Prompt tokens in cells" });
  const cells = [...Array(7)].map(() => element("td"));
  cells[2].append(progress, element("span"));
  return element("tr", {}, ...cells);
}
