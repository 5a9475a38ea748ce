// What stands beside the list: a person's history, their data, and the two questions.

import { about, ask } from "./api.js";
import { $, announce, make, toast } from "./dom.js";
import { ago, did, fault } from "./words.js";

const FEW = 8;
const PATIENCE_MS = 20000;

let shown = FEW;
let known = new Set();

/** Read and draw the newest events of `user`; what came since the last time is marked. */
export async function history(user, fresh = false) {
  if (fresh) [shown, known] = [FEW, new Set()];
  const list = $("history");
  try {
    const { body } = await ask("GET", about(user, `history?limit=${shown + 1}`));
    const rows = body.events.slice(0, shown).map((event) => {
      const id = `${event.item_id} ${event.occurred_at} ${event.kind}`;
      const time = make("time", { dateTime: event.occurred_at, title: new Date(event.occurred_at).toLocaleString() }, ago(event.occurred_at));
      const row = make("li", {}, make("span", {}, event.title ?? event.item_id), time, make("span", { className: "did" }, did(event)));
      if (known.size && !known.has(id)) row.className = "fresh";
      return [id, row];
    });
    known = new Set(rows.map(([id]) => id));
    list.replaceChildren(...(rows.length ? rows.map(([, row]) => row) : [make("li", { className: "hint" }, "Nothing yet. What you say to the list begins it.")]));
    $("history-more").hidden = body.events.length <= shown || shown > FEW;
  } catch (error) {
    list.replaceChildren(make("li", { className: "hint" }, fault(error)));
    $("history-more").hidden = true;
  }
}

export function moreHistory(user) {
  shown = 40;
  return history(user).then(() => announce("More of the history is shown"));
}

/** Save `document` as a file of this device. */
function download(document_, name) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(document_, null, 1)], { type: "application/json" }));
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

const says = (text) => ($("data-says").textContent = text);

/** All that is held of `user`, as a file: at once what the database has, and the lake's part when it is ready. */
export async function exportData(user) {
  says("Gathering what is held…");
  try {
    let { body } = await ask("POST", about(user, "export"));
    const until = Date.now() + PATIENCE_MS;
    while (body.state === "waiting" && Date.now() < until) {
      says("Part of it is there; the archive is being read…");
      await new Promise((done) => setTimeout(done, 2000));
      ({ body } = await ask("GET", about(user, `export/${body.receipt_id}`)));
    }
    download(body, "larder-export.json");
    says(body.state === "waiting" ? "Saved what is there now. The archive is still being read: ask again later for all of it." : "Saved as larder-export.json.");
  } catch (error) {
    says(missing(error, "Exporting is not offered here yet."));
  }
}

/** Agree to a personal list, or stop it. Gives whether it was kept. */
export async function consent(user, personalise) {
  try {
    await ask("POST", about(user, "consent"), { personalise });
    says(personalise ? "Thank you. Your list is personal again." : "Nothing about you is read any more. You see what most people like.");
    return true;
  } catch (error) {
    says(missing(error, "Choosing this is not offered here yet."));
    return false;
  }
}

export async function forget(user) {
  try {
    const { body } = await ask("POST", about(user, "forget"));
    says(`You are hidden from now on. The rest waits to be deleted; receipt ${body.receipt_id.slice(0, 8)}…`);
    toast("Forgotten. From now on nothing here knows this person.", 9000);
    return true;
  } catch (error) {
    says(error.status === 404 ? "Nothing is held of this person, so there is nothing to forget." : fault(error));
    return false;
  }
}

/** A route that this version does not have yet is no fault of the reader's. */
const missing = (error, text) => (error.status === 404 || error.status === 405 ? text : fault(error));

/** Show the two questions if it is this person's turn. */
export async function survey(user, requestId) {
  const form = $("survey");
  const { body } = await ask("GET", about(user, "survey"));
  if (!body.questions.length) return;
  for (const field of form.querySelectorAll("fieldset")) {
    const name = field.dataset.question;
    field.hidden = !body.questions.includes(name);
    const choices = [1, 2, 3, 4, 5].map((value) =>
      make("label", {}, make("input", { type: "radio", name, value: String(value), "aria-label": `${value} of 5` }), String(value)));
    field.querySelector(".scale").replaceChildren(make("span", {}, "not at all"), ...choices, make("span", {}, "very much"));
  }
  form.dataset.user = user;
  form.dataset.request = requestId;
  form.hidden = false;
}

export async function answerSurvey() {
  const form = $("survey");
  const answers = [...new FormData(form)].map(([question, answer]) => ({ question, answer: Number(answer) }));
  if (!answers.length) return toast("Choose a number first, or “Not now”.");
  try {
    await ask("POST", "survey", { user_id: form.dataset.user, request_id: form.dataset.request, answers });
    form.hidden = true;
    $("list-title").closest("section").querySelector(".title")?.focus();
    toast("Thank you. That helps to judge what was changed.");
  } catch (error) {
    toast(fault(error));
  }
}
