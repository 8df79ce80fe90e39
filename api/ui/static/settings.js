// The settings of requests, which the browser keeps.

import { byId, element } from "./dom.js";
import { originChip } from "./tokens.js";

const STORED = "paceline.settings";
// Name of the request's field, label, and attributes of the input.
const NUMBERS = [
  ["temperature", "temperature", { min: 0, max: 100, step: 0.05 }],
  ["top_p", "top_p", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "top_k", { min: 0, step: 1 }],
  ["min_p", "min_p", { min: 0, max: 1, step: 0.01 }],
  ["repeat_penalty", "repeat_penalty", { min: 0, step: 0.01 }],
  ["max_tokens", "max_tokens", { min: 1, step: 1 }],
  ["seed", "seed", { min: 0, step: 1 }],
];

/** Adds the fields to the page, with the values of the last visit. */
export function addSettings() {
  const stored = JSON.parse(localStorage.getItem(STORED) ?? "{}");
  const numbers = NUMBERS.map(([name, label, limits]) =>
    field(label, element("input", { id: `set-${name}`, type: "number", placeholder: "default", ...limits })),
  );
  const speculation = element("select", { id: "set-speculative" }, option("default", ""), option("off", "none"));
  byId("fields").append(
    field("System prompt", element("textarea", { id: "set-system", rows: 2 }), true),
    ...numbers,
    field("speculation", speculation),
    field("JSON schema of the answer", element("textarea", { id: "set-schema", rows: 2 }), true),
    field("Tools (JSON list)", element("textarea", { id: "set-tools", rows: 2 }), true),
  );
  for (const input of inputs()) {
    if (stored[input.id]) input.value = stored[input.id];
    input.addEventListener("change", save);
  }
  byId("show-origins").checked = stored["show-origins"] !== "off";
  byId("show-origins").addEventListener("change", save);
}

/** Sets the server's defaults as placeholders, and the proposers that requests can select. */
export function showDefaults(props) {
  const defaults = props.default_generation_settings.params;
  for (const [name] of NUMBERS) {
    const known = typeof defaults[name] === "number" && defaults[name] >= 0 && name !== "seed";
    if (known) byId(`set-${name}`).placeholder = String(Number(defaults[name].toFixed(4)));
  }
  const select = byId("set-speculative");
  const chosen = select.value || JSON.parse(localStorage.getItem(STORED) ?? "{}")["set-speculative"] || "";
  select.replaceChildren(
    option("default", ""),
    option("off", "none"),
    ...props.speculative.available.map((type) => option(type, type)),
  );
  select.value = chosen;
  const types = props.speculative.default ?? props.speculative.available;
  byId("legend").replaceChildren(...["model", ...types].map((type) => originChip(type, type)));
}

/** Returns the fields of a request. Throws SyntaxError for a schema or tools that are no JSON. */
export function requestFields() {
  const fields = {};
  for (const [name] of NUMBERS) {
    const text = byId(`set-${name}`).value;
    if (text !== "") fields[name] = Number(text);
  }
  if (byId("set-speculative").value) fields.speculative = byId("set-speculative").value;
  const schema = parsed("set-schema", "JSON schema");
  if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = parsed("set-tools", "Tools");
  if (tools) fields.tools = tools;
  if (byId("show-origins").checked) Object.assign(fields, { token_origins: true, logprobs: true });
  return fields;
}

export const systemPrompt = () => byId("set-system").value.trim();

function parsed(id, name) {
  const text = byId(id).value.trim();
  try {
    return text ? JSON.parse(text) : null;
  } catch (error) {
    throw new SyntaxError(`${name}: ${error.message}`);
  }
}

const inputs = () => document.querySelectorAll("#fields input, #fields select, #fields textarea");
const option = (label, value) => element("option", { value }, label);

function field(label, input, wide = false) {
  return element("label", { className: wide ? "wide" : "" }, label, input);
}

function save() {
  const values = Object.fromEntries([...inputs()].map((input) => [input.id, input.value]));
  values["show-origins"] = byId("show-origins").checked ? "on" : "off";
  localStorage.setItem(STORED, JSON.stringify(values));
}
