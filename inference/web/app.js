// The page's one state and how it moves: key or link → person → list, and back again.

import { Fault, ask, drop, fromAddress, keep, session, timings, understand } from "./api.js";
import { $, announce, make, toast } from "./dom.js";
import { Feedback } from "./feedback.js";
import { draw, skeletons } from "./list.js";
import * as person from "./person.js";
import { NOT_PERSONAL, fault, milliseconds, rung, said, variety } from "./words.js";

const SIZE = 10;
const state = { user: null, wish: "", diversity: 0, requestId: null, items: [], personal: true, open: null, asked: null };
const feedback = new Feedback(
  (count) => load({ quiet: true, after: count === 1 ? "Noted; your list has changed" : `${count} answers noted; your list has changed` }),
  (error, items) => {
    toast(`That was not kept: ${fault(error)}`, 9000);
    if (items.length) redraw();
  },
);

function show(place) {
  for (const id of ["gate-key", "gate-person", "room"]) $(id).hidden = id !== place;
  $("who").hidden = place === "gate-key";
  $("who").firstElementChild.hidden = place !== "room";
  $("change-person").hidden = place !== "room" || Boolean(session()?.link);
  document.title = place === "room" ? `For ${state.user} · Larder` : "Larder";
}

// --- key, link, person ---------------------------------------------------------------------------------------------

function begin(first = {}) {
  const held = session();
  if (!held) {
    show("gate-key");
    if (first.refused) complain("key", "That link holds no key of ours.");
    $("key").focus();
  } else if (held.link) {
    choose(held.link.user);
  } else if (first.person) {
    choose(first.person);
  } else {
    askWho();
  }
}

function complain(field, text) {
  $(`${field}-fault`).textContent = text;
  $(`${field}-fault`).hidden = !text;
  $(field).setAttribute("aria-invalid", String(Boolean(text)));
}

async function askWho() {
  show("gate-person");
  complain("person", "");
  $("person").focus();
  try {
    const { body } = await ask("GET", "people");
    const chips = body.people.map((id) => {
      const chip = make("button", { type: "button" }, id);
      chip.addEventListener("click", () => choose(id));
      return make("li", {}, chip);
    });
    $("people-list").replaceChildren(...chips);
    $("people").hidden = !chips.length;
  } catch (error) {
    refused(error, "person");
  }
}

/** Back to the first gate when the key is no good; else say it beside `field`. */
function refused(error, field) {
  if (error.status !== 401) return complain(field, fault(error));
  drop();
  show("gate-key");
  complain("key", fault(error));
  $("key").focus();
  return undefined;
}

function choose(user) {
  Object.assign(state, { user, wish: "", diversity: 0, items: [], requestId: null, open: null, personal: true, asked: null });
  $("wish").value = "";
  $("diversity").value = "0";
  $("diversity-says").textContent = variety(0);
  $("who-name").textContent = user;
  $("data-says").textContent = "";
  $("survey").hidden = true;
  show("room");
  const link = session()?.link;
  // A personal link is for one purpose: what it does not open is not offered.
  for (const [id, purpose] of [["export", "export"], ["forget", "forget"], ["consent", "consent"]]) $(id).hidden = Boolean(link) && link.purpose !== purpose;
  document.querySelector(".chosen").hidden = Boolean(link);
  document.querySelector(".side .card").hidden = Boolean(link) && link.purpose !== "export";
  if (!link || link.purpose === "export") person.history(user, true);
  if (!link) load({});
  $("main").focus();
}

// --- the list ------------------------------------------------------------------------------------------------------

let running = null;

async function load({ quiet = false, after = "" }) {
  running?.abort();
  const mine = (running = new AbortController());
  closeRow();
  if (state.items.length) $("list").classList.add("kept");
  else {
    skeletons(SIZE);
    $("list").hidden = false;
  }
  $("list").setAttribute("aria-busy", "true");
  $("empty").hidden = true;
  const sent = await feedback.flush();
  const document_ = { user_id: state.user, k: SIZE, explain: true };
  if (state.wish) document_.prompt = state.wish;
  if (state.diversity) document_.diversity = state.diversity;
  try {
    const { body, headers } = await ask("POST", "recommendations", document_, { signal: mine.signal });
    if (mine.signal.aborted) return;
    received(body, timings(headers), after);
    if (quiet || sent) person.history(state.user);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Fault)) throw error;
    failed(error);
  } finally {
    if (running === mine) $("list").setAttribute("aria-busy", "false");
  }
}

function received(answer, steps, after) {
  const before = new Set(state.items.map((item) => item.item_id));
  Object.assign(state, { items: answer.items, requestId: answer.request_id, personal: answer.personalised !== false });
  redraw();
  const fresh = answer.items.filter((item) => !before.has(item.item_id)).length;
  const many = `${answer.items.length} ${answer.items.length === 1 ? "thing" : "things"}`;
  $("list-title").textContent = state.wish ? `For “${state.wish}”` : "Your list";
  $("list-note").textContent = before.size && fresh ? `${many}, ${fresh} of them new here` : `${many}, best first`;
  const words = answer.degraded.map(rung);
  if (!state.personal) words.unshift(NOT_PERSONAL);
  $("degraded").replaceChildren(...words.map((text) => make("p", {}, text)));
  $("degraded").hidden = !words.length;
  $("consent").textContent = state.personal ? "Stop personalising" : "Make it personal";
  $("empty").hidden = Boolean(answer.items.length);
  $("empty").textContent = state.wish ? "Nothing fits this wish. Try other words." : "There is nothing left to show.";
  $("list").hidden = !answer.items.length;
  facts(answer, steps);
  announce(`${after ? `${after}. ` : ""}${$("list-title").textContent}: ${$("list-note").textContent}${answer.items[0] ? `. First: ${answer.items[0].title}` : ""}`);
  if (state.asked !== state.user) {
    state.asked = state.user;
    person.survey(state.user, answer.request_id).catch(() => {});
  }
}

function failed(error) {
  if (error.status === 401) {
    refused(error, "key");
    return;
  }
  state.items = [];
  $("list").replaceChildren();
  $("list").hidden = true;
  $("made").hidden = true;
  $("empty").hidden = false;
  const again = make("button", { type: "button" }, "Try again");
  again.addEventListener("click", () => load({}));
  $("empty").replaceChildren(make("p", {}, fault(error)), again);
  $("list-note").textContent = "There is no list right now";
  announce(fault(error));
}

/** Which versions and which arm answered, and where the time went. */
function facts(answer, steps) {
  const total = steps.find(([name]) => name === "total")?.[1];
  const rows = [
    ["Model", answer.model_version ?? "none"],
    ["Reads wishes by", answer.prompt_version ?? (state.wish ? "the wish was not used" : "no wish was given")],
    ["Experiment", answer.experiment ? `${answer.experiment.name}, arm “${answer.experiment.arm}”` : "none"],
    ["Left out", answer.degraded.length ? answer.degraded.join(", ") : "nothing"],
    ["Request", answer.request_id],
  ];
  $("made-facts").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  $("made-short").textContent = total === undefined ? "" : `answered in ${milliseconds(total)}`;
  $("timings").replaceChildren(...steps.map(([name, took]) => {
    const bar = make("i");
    bar.style.width = `${Math.max(1, (took / (total || 1)) * 100)}%`;
    return make("li", {}, make("span", {}, name), make("span", { className: "effect", "aria-hidden": "true" }, bar), make("span", {}, milliseconds(took)));
  }));
  $("timings").hidden = $("timings-title").hidden = !steps.length;
  $("made").hidden = false;
}

const redraw = () => draw(state.items, feedback, state.open, act);

function act(what, item) {
  if (what === "open" || what === "why") return toggle(what, item);
  feedback.say(what, item.item_id, state.user, state.requestId);
  redraw();
  const now = feedback.of(item.item_id);
  announce(now ? `${said(now)}: ${item.title}. Press again to undo.` : `Taken back: ${item.title}`);
  return undefined;
}

function closeRow() {
  if (!state.open) return;
  feedback.close(state.open.item).catch(() => {});
  state.open = null;
}

async function toggle(what, item) {
  const same = state.open?.item === item.item_id && (state.open.alike !== undefined) === (what === "open");
  closeRow();
  if (!same) state.open = { item: item.item_id, alike: what === "open" ? null : undefined };
  redraw();
  if (same || what !== "open") return;
  const opened = state.open;
  feedback.open(item.item_id, state.user, state.requestId).catch(() => {});
  try {
    opened.alike = (await ask("POST", "similar", { item_id: item.item_id, k: 5 })).body.items;
  } catch (error) {
    opened.fault = fault(error);
  }
  if (state.open === opened) redraw();
}

// --- what is pressed -----------------------------------------------------------------------------------------------

const submitted = (id, then) => $(id).addEventListener("submit", (event) => {
  event.preventDefault();
  then();
});
const pressed = (id, then) => $(id).addEventListener("click", then);

submitted("key-form", () => {
  const found = understand($("key").value);
  if (!found) return complain("key", "That is neither a key (larder_…) nor a personal link (/people/…?token=…).");
  complain("key", "");
  $("key").value = "";
  keep(found);
  return begin();
});
submitted("person-form", () => choose($("person").value.trim()));
submitted("wish-form", () => {
  state.wish = $("wish").value.trim();
  load({});
});
// The little cross of a search field empties it without a submit.
$("wish").addEventListener("search", () => {
  if ($("wish").value || !state.wish) return;
  state.wish = "";
  load({});
});
let turning;
$("diversity").addEventListener("input", () => {
  state.diversity = Number($("diversity").value);
  $("diversity-says").textContent = variety(state.diversity);
  $("diversity").setAttribute("aria-valuetext", variety(state.diversity));
  clearTimeout(turning);
  turning = setTimeout(() => load({}), 250);
});
pressed("change-person", () => feedback.flush().then(askWho));
pressed("lock", async () => {
  await feedback.flush();
  drop();
  state.user = null;
  begin();
});
pressed("history-more", () => person.moreHistory(state.user));
pressed("export", () => person.exportData(state.user));
pressed("consent", async () => (await person.consent(state.user, !state.personal)) && load({ quiet: true }));
pressed("forget", () => {
  $("forget-name").textContent = state.user;
  $("forget-dialog").returnValue = "no";
  $("forget-dialog").showModal();
});
$("forget-dialog").addEventListener("close", async () => {
  if ($("forget-dialog").returnValue !== "yes") return;
  if (!(await person.forget(state.user))) return;
  if (session()?.link) return;
  load({ quiet: true });
});
submitted("survey", () => person.answerSurvey());
pressed("survey-no", () => ($("survey").hidden = true));
addEventListener("pagehide", () => feedback.leave().catch(() => {}));
addEventListener("hashchange", () => {
  const found = fromAddress();
  if (found.person || found.refused || (session() && $("room").hidden)) begin(found);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || $("room").hidden || event.target.matches("input, textarea")) return;
  event.preventDefault();
  $("wish").focus();
});

begin(fromAddress());
