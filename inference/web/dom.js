// The few ways in which this page touches the document. Text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (those with a dash, `role` and `for`) and children. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SHAPES = {
  up: "M7 10.5h-3v9h3zM7 10.5l3.9-6.8a1.9 1.9 0 0 1 3.5 1.4l-.9 4.4h4.7a2 2 0 0 1 1.95 2.450l-1.45 6a2 2 0 0 1-1.95 1.550h-9.75",
  down: "M17 13.5h3v-9h-3zM17 13.5l-3.9 6.8a1.9 1.9 0 0 1-3.5-1.4l.9-4.4h-4.7a2 2 0 0 1-1.95-2.450l1.45-6a2 2 0 0 1 1.95-1.550h9.75",
  hide: "M3.5 3.5l17 17M9.9 5.7a9.8 9.8 0 0 1 2.1-.2c4.8 0 8.2 3.7 9.5 6.5a12 12 0 0 1-2.5 3.5M6.3 7.3a12.5 12.5 0 0 0-3.8 4.7c1.3 2.8 4.7 6.5 9.5 6.5 1.5 0 2.9-.4 4.1-1M9.9 9.9a3 3 0 0 0 4.2 4.2",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Says something to those who listen instead of looking. */
export function announce(text) {
  $("live").textContent = "";
  // A text that does not change is not read again.
  setTimeout(() => ($("live").textContent = text), 30);
}

let hideToast;
/** Something short at the foot of the page, read out as well. */
export function toast(text, milliseconds = 6000) {
  clearTimeout(hideToast);
  $("toast").textContent = text;
  $("toast").hidden = false;
  hideToast = setTimeout(() => ($("toast").hidden = true), milliseconds);
}
