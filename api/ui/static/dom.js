// Elements of the page. All texts are inserted as text nodes.

export const byId = (id) => document.getElementById(id);

/** Returns a new element with properties, `data-` attributes and children, each an element or a text. */
export function element(tag, { data = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

/** Sets the text of an element without touching it if the text is the same. */
export function setText(target, text) {
  if (target.textContent !== String(text)) target.textContent = text;
}

const COUNT = new Intl.NumberFormat("en");

export const count = (number) => COUNT.format(number);
export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
export const decimal = (number, digits = 1) => (number === null ? "–" : number.toFixed(digits));

/** Returns bytes with a unit, as in 1.5 GB. */
export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = number < 1 ? 0 : Math.min(4, Math.floor(Math.log10(number) / 3));
  return `${(number / 1000 ** power).toFixed(power && number / 1000 ** power < 10 ? 1 : 0)} ${units[power]}`;
}
