// Elements of the page. All texts are inserted as text nodes.

export const byId = (id) => document.getElementById(id);

/** Returns a new element with properties, `data-` attributes and children, each an element or a text. */
export function element(tag, { data = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.dataset, data);
  node.append(...children);
  return node;
}

/** Sets the text of an element, unless the element has this text already. */
export function setText(target, text) {
  if (target.textContent !== String(text)) target.textContent = text;
}

export const button = (label, action) => element("button", { type: "button", onclick: action }, label);

/** Lets screen readers announce a text, after the announcement in progress. */
export function announce(text) {
  byId("announcement").textContent = text;
}

/** Copies a text that an element shows. On plain http browsers permit the copy of the selection only. */
export async function copyText(text, shown) {
  getSelection().selectAllChildren(shown);
  const write = navigator.clipboard?.writeText(text) ?? Promise.reject();
  const isCopied = await write.then(() => true, () => document.execCommand("copy"));
  announce(isCopied ? "Copied" : "Selected");
}

const COUNT = new Intl.NumberFormat("en");

export const count = (number) => COUNT.format(number);
export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
export const decimal = (number, digits = 1) => (number === null ? "–" : number.toFixed(digits));

/** Returns seconds with a unit, as in 40 ms or 1.5 s. */
export function duration(seconds) {
  const size = Math.abs(seconds);
  const text = size < 1 ? `${Math.round(1000 * size)} ms` : size < 120 ? `${size.toFixed(1)} s` : `${(size / 60).toFixed(1)} min`;
  return seconds < 0 && !text.startsWith("0 ") ? `−${text}` : text;
}

/** Returns bytes with a unit, as in 1.5 GB. */
export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = number < 1 ? 0 : Math.min(4, Math.floor(Math.log10(number) / 3));
  return `${(number / 1000 ** power).toFixed(power && number / 1000 ** power < 10 ? 1 : 0)} ${units[power]}`;
}
