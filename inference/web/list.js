// Draws the list: rows, their buttons, what opens beneath a row, and how rows move when the list changes.

import { because, capital, said, shortReason } from "./words.js";
import { $, icon, make, still } from "./dom.js";

const LABELS = { up: "I like this", down: "Not for me", hide: "Hide this" };

export function skeletons(count) {
  const rows = Array.from({ length: count }, (_, place) => {
    const [wide, narrow] = [make("span", { className: "bone" }), make("span", { className: "bone" })];
    wide.style.width = `${52 - ((place * 7) % 23)}%`;
    narrow.style.width = `${34 - ((place * 5) % 13)}%`;
    return make("li", { className: "item skeleton", "aria-hidden": "true" },
      make("div", { className: "line" }, make("span"), make("div", {}, wide, narrow)));
  });
  $("list").classList.remove("kept");
  $("list").replaceChildren(...rows);
}

/** Draw `items`; `feedback` knows what was said of them, `act` is told what is pressed. */
export function draw(items, feedback, open, act) {
  const list = $("list");
  const before = new Map([...list.children].filter((row) => row.dataset.item).map((row) => [row.dataset.item, row.getBoundingClientRect().top]));
  const focus = focused(list);
  list.classList.remove("kept");
  list.replaceChildren(...items.map((item, place) => row(item, place, feedback, open, act)));
  restore(list, focus);
  if (!still()) for (const made of list.children) move(made, before);
}

/** Where the keyboard was: which row and which of its buttons. */
function focused(list) {
  const at = document.activeElement;
  const row = at?.closest?.("li.item");
  if (!row || !list.contains(row)) return null;
  return { item: row.dataset.item, place: [...list.children].indexOf(row), button: at.dataset.act };
}

function restore(list, focus) {
  if (!focus || !list.children.length) return;
  const row = [...list.children].find((one) => one.dataset.item === focus.item) ?? list.children[Math.min(focus.place, list.children.length - 1)];
  (row.querySelector(`[data-act="${focus.button}"]`) ?? row.querySelector("button"))?.focus({ preventScroll: true });
}

function move(made, before) {
  const was = before.get(made.dataset.item);
  const now = made.getBoundingClientRect().top;
  if (was === undefined && before.size) made.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 320, easing: "ease-out" });
  else if (was !== undefined && was !== now) {
    made.animate([{ transform: `translateY(${was - now}px)` }, { transform: "none" }], { duration: 320, easing: "cubic-bezier(.2,.7,.2,1)" });
  }
}

function row(item, place, feedback, open, act) {
  const now = feedback.of(item.item_id);
  const made = make("li", { className: "item" });
  made.dataset.item = item.item_id;
  if (now === "hide") {
    made.classList.add("gone");
    made.append(make("div", { className: "line" }, number(place),
      make("p", {}, `${said("hide")}: ${item.title}`),
      make("div", { className: "acts" }, button("hide", "Undo", { className: "quiet", "aria-label": `Undo: show ${item.title} again` }, item, act))));
    return made;
  }
  const opened = open?.item === item.item_id ? open : null;
  const panel = `more-${place}`;
  const title = button("open", item.title, { className: "title", "aria-expanded": String(opened?.alike !== undefined), "aria-controls": panel }, item, act);
  const acts = make("div", { className: "acts", role: "group", "aria-label": `Say what you think of ${item.title}` },
    button("why", "Why this?", { className: "quiet why", "aria-expanded": String(Boolean(opened)), "aria-controls": panel, "aria-label": `Why this? ${item.title}` }, item, act),
    ...["up", "down", "hide"].map((what) => {
      const press = button(what, icon(what), { className: `act ${what}`, title: LABELS[what], "aria-label": `${LABELS[what]}: ${item.title}` }, item, act);
      if (what !== "hide") press.setAttribute("aria-pressed", String(now === what));
      return press;
    }));
  const short = now ? `${said(now)} — noted, and taken in within moments` : shortReason(item);
  made.append(
    make("div", { className: "line" }, number(place), make("div", {}, title, make("p", { className: "because" }, short)), acts),
    more(panel, item, opened),
  );
  return made;
}

const number = (place) => make("span", { className: "place", "aria-hidden": "true" }, String(place + 1));

function button(what, content, properties, item, act) {
  const made = make("button", { type: "button", ...properties }, content);
  made.dataset.act = what;
  made.addEventListener("click", () => act(what, item));
  return made;
}

/** What opens beneath a row: the reasons, and what is alike. */
function more(id, item, opened) {
  const made = make("div", { className: "more", id, hidden: !opened });
  if (!opened) return made;
  made.append(make("div", {}, make("h3", {}, "Why this is here"), reasons(item)));
  if (opened.alike !== undefined) {
    const names = opened.alike?.map((other) => make("span", {}, other.title));
    made.append(make("div", {}, make("h3", {}, "More like this"),
      make("div", { className: "alike" }, ...(names ?? [opened.fault ?? "Looking…"]))));
  }
  return made;
}

function reasons(item) {
  const found = item.because ?? [];
  if (!found.length) {
    const told = item.reasons?.length ? item.reasons.map(capital) : ["It is liked by many"];
    return make("ul", { className: "reasons" }, ...told.map((text) => make("li", {}, text)));
  }
  const largest = Math.max(...found.map((entry) => Math.abs(entry.effect ?? 0))) || 1;
  return make("ul", { className: "reasons" }, ...found.map((entry) => {
    if (!entry.effect) return make("li", {}, because(entry));
    const bar = make("i");
    bar.style.width = `${Math.max(6, (Math.abs(entry.effect) / largest) * 100)}%`;
    const way = entry.effect > 0 ? "speaks for it" : "speaks against it";
    return make("li", { className: "reason" }, make("span", {}, because(entry)),
      make("span", { className: `effect${entry.effect < 0 ? " against" : ""}`, role: "img", "aria-label": `${way}, ${Math.abs(entry.effect).toFixed(2)}`, title: way }, bar));
  }));
}
