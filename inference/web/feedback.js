// What a person says to items. It shows at once, can be taken back for a few seconds, and is then posted in one batch.
//
//   up    rating, value 5        down   hide, value 1 (the lowest mark)        hide   hide, no value
//   click  opened                view   kept open for at least ten seconds
//
// Why so: docs/feedback.md. Each event carries the request_id of the list that showed the item.

import { ask } from "./api.js";

export const UNDO_MS = 5000;
const DWELL_MS = 10000;
const MEANS = { up: ["rating", 5], down: ["hide", 1], hide: ["hide", null] };

function eventId() {
  // randomUUID is there on secure origins alone; a machine in the same house may be reached by plain HTTP.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return "page-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Feedback {
  /** `onSaved(count)` after a batch was kept, `onFailed(error, items)` if it was not. */
  constructor(onSaved, onFailed) {
    this.waiting = new Map();
    this.opened = new Map();
    this.timer = 0;
    this.onSaved = onSaved;
    this.onFailed = onFailed;
  }

  /** What waits to be said of an item: up, down, hide or undefined. */
  of(itemId) {
    return this.waiting.get(itemId)?.said;
  }

  /** Say `what` of an item; the same again takes it back. */
  say(what, itemId, user, requestId) {
    if (this.of(itemId) === what) this.waiting.delete(itemId);
    else this.waiting.set(itemId, { said: what, event: this.event(user, itemId, requestId, ...MEANS[what]) });
    clearTimeout(this.timer);
    if (this.waiting.size) this.timer = setTimeout(() => this.flush().then((sent) => sent && this.onSaved(sent)), UNDO_MS);
  }

  event(user, itemId, requestId, kind, value) {
    const made = { event_id: eventId(), user_id: user, item_id: itemId, kind, request_id: requestId };
    if (value !== null) made.value = value;
    // Without a time it counts as of its arrival: the clock of a phone may be anything.
    return made;
  }

  /** Post what waits; gives how many. With `leaving` the browser sends it although the page goes away. */
  async flush(leaving = false) {
    clearTimeout(this.timer);
    const events = [...this.waiting.values()].map((entry) => entry.event);
    if (!events.length) return 0;
    this.waiting.clear();
    try {
      await this.post(events, leaving);
      return events.length;
    } catch (error) {
      this.onFailed(error, events.map((event) => event.item_id));
      return 0;
    }
  }

  post(events, leaving = false) {
    return ask("POST", "events", { events }, { keepalive: leaving });
  }

  /** An item was opened: a click, posted by itself; nobody takes that back. */
  open(itemId, user, requestId) {
    this.opened.set(itemId, { user, requestId, at: Date.now() });
    return this.post([this.event(user, itemId, requestId, "click", null)]);
  }

  /** It was closed, or the page left: a view, if it was looked at for long enough. */
  close(itemId, leaving = false) {
    const found = this.opened.get(itemId);
    this.opened.delete(itemId);
    if (found && Date.now() - found.at >= DWELL_MS) {
      return this.post([this.event(found.user, itemId, found.requestId, "view", null)], leaving);
    }
    return Promise.resolve();
  }

  /** Nothing is lost when the tab goes. */
  leave() {
    for (const itemId of [...this.opened.keys()]) this.close(itemId, true).catch(() => {});
    return this.flush(true);
  }
}
