// The live view: a snapshot of the server each second while the page is visible.

import { setModel } from "./chat.js";
import { byId, bytes, count, decimal, duration, element, percent, setText } from "./dom.js";
import { eventsOf, request } from "./server.js";
import { showDefaults } from "./settings.js";
import { originChip } from "./tokens.js";

const HISTORY_SECONDS = 180;
const MIN_CHART_SECONDS = 60;
const RETRY_MS = 1000;

const history = [];
let controller = new AbortController();

/** Shows the server's snapshots until the page is closed. A hidden page has no connection for them. */
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

/** Shows why there are no snapshots. Returns true if the key has no access to them, which leaves the chat only. */
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
  setText(byId("prompts"), prompt ? `${percent(cached, prompt)} of ${count(prompt)} prompt tokens were in the cache` : "");
  showChart("rate", history.map((each) => each.tokens_per_second ?? 0));
  showChart("step", history.map((each) => each.step_ms ?? 0));
  showKV(snapshot.kv);
  showProposers(snapshot.proposers.filter((each) => each.drafted), snapshot.busy_seconds);
  showSlots(snapshot.slots);
}

/** Draws the values as a line that ends at the right edge, with zero at the bottom and the maximum at the top. */
function showChart(name, values) {
  const svg = byId(`${name}-chart`);
  const width = Math.max(MIN_CHART_SECONDS, values.length) - 1;
  svg.setAttribute("viewBox", `0 0 ${width} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  const top = Math.max(...values);
  const line = svg.firstChild ?? svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  const start = width + 1 - values.length;
  const points = values.map((value, x) => `${start + x},${(39 - (37 * value) / (top || 1)).toFixed(1)}`);
  line.setAttribute("points", points.join(" "));
  setText(byId(`${name}-top`), `max ${decimal(top)} in ${values.length} s`);
}

function showKV(kv) {
  const used = kv.cells_running + kv.cells_idle;
  setText(byId("kv-share"), percent(used, kv.cells));
  const parts = [
    [kv.cells_running, `${count(kv.cells_running)} tokens of running requests`],
    [kv.cells_idle, `${count(kv.cells_idle)} of earlier requests, for reuse`],
    [kv.cells - used, `${count(kv.cells - used)} free`],
  ];
  const tiers = [tier(kv.cells, parts)];
  for (const [label, size, capacity] of [
    ["RAM", kv.ram_bytes, kv.ram_capacity],
    ["disk", kv.disk_bytes, kv.disk_capacity],
  ]) {
    if (capacity) tiers.push(tier(capacity, [[size, `${bytes(size)} of ${bytes(capacity)} in ${label}, for reuse`]]));
  }
  byId("kv").replaceChildren(...tiers);
}

/** Returns a bar with a legend. Each part has its size and its label. */
function tier(capacity, parts) {
  const bars = parts.map(([size]) => {
    const bar = element("i");
    bar.style.width = `${(100 * size) / capacity}%`;
    return bar;
  });
  const legend = parts.map(([, label]) => element("span", {}, element("i"), label));
  return element(
    "div",
    { className: "tier" },
    element("div", { className: "bar" }, ...bars),
    element("p", { className: "facts" }, ...legend),
  );
}

function showProposers(proposers, busySeconds) {
  byId("proposers").hidden = !proposers.length;
  proposers.sort((one, other) => other.saved_seconds - one.saved_seconds);
  setText(byId("saved"), savedText(proposers, busySeconds));
  const rows = proposers.map((each) => {
    const share = percent(each.accepted, each.drafted);
    const texts = [duration(each.saved_seconds), `${count(each.accepted)} of ${count(each.drafted)}`, share];
    const cells = [originChip(each.type, each.type), ...texts].map((content) => element("td", {}, content));
    return element("tr", { data: { type: each.type } }, ...cells);
  });
  byId("proposers").tBodies[0].replaceChildren(...rows);
}

/** Returns a sentence on the time that drafts saved. `proposers` begins with the proposer that saved most. */
function savedText(proposers, busySeconds) {
  if (!proposers.length) return "No drafts yet. Most proposers need a text that repeats itself or an earlier one.";
  const total = proposers.reduce((sum, each) => sum + each.saved_seconds, 0);
  const [best] = proposers;
  const helped = best.saved_seconds > 0 ? ` ${best.type} helped most.` : "";
  if (total < 0) return `Drafts have cost ${duration(-total)} more than they saved so far.${helped}`;
  const share = percent(total, busySeconds + total);
  return `Drafts have saved ${duration(total)} so far, ${share} of the computing time without them.${helped}`;
}

function showSlots(slots) {
  byId("slots-part").hidden = !slots.length;
  setText(byId("busy"), `${slots.filter((each) => each.state !== "idle").length} of ${slots.length}`);
  const body = byId("slots").tBodies[0];
  while (body.rows.length > slots.length) body.deleteRow(-1);
  while (body.rows.length < slots.length) body.append(slotRow());
  slots.forEach((slot, index) => showSlot(body.rows[index], slot));
}

function showSlot(row, slot) {
  row.dataset.state = slot.state;
  const isPrefill = slot.state === "prefill";
  const [bar, prompt] = row.cells[2].children;
  bar.hidden = !isPrefill;
  bar.max = slot.prompt || 1;
  bar.value = slot.processed;
  setText(prompt, slot.prompt ? `${isPrefill ? `${count(slot.processed)} / ` : ""}${count(slot.prompt)}` : "");
  const limit = slot.max_tokens === null ? "" : `/${count(slot.max_tokens)}`;
  const rate = slot.tokens_per_second === null ? "" : decimal(slot.tokens_per_second);
  const accepted = slot.drafted ? percent(slot.accepted, slot.drafted) : "";
  const texts = [slot.id, slot.state, null, slot.prompt ? count(slot.emitted) + limit : "", rate, slot.draft || "", accepted];
  texts.forEach((text, column) => text !== null && setText(row.cells[column], text));
}

function slotRow() {
  const progress = element("progress", { value: 0, ariaLabel: "Prompt tokens in cells" });
  const cells = [...Array(7)].map(() => element("td"));
  cells[2].append(progress, " ", element("span"));
  return element("tr", {}, ...cells);
}
