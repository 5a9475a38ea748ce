// What the page says: every word that is made from an answer of the function.

/** Each rung of the ladder, as a person would put it. */
const RUNGS = {
  features: "Part of what you did lately could not be read, so this list is a little less personal.",
  wish: "Your wish could not be understood just now. This list goes by your history alone.",
  release: "A newer model is on its way. Until it is there, the one before it answers.",
  ranker: "The model is away. This list was put together by simple counting.",
  database: "The store is out of reach. This is what most people like; what you say here cannot be kept right now.",
  explanations: "There was no time to try out why each of these is here; what you see is what they have in common.",
  wish_parser: "Your wish was taken word by word; the language model that helps to read it is away.",
};

export const rung = (name) => RUNGS[name] ?? `One part is away right now (${name}). The list is made without it.`;

export const NOT_PERSONAL = "You have not agreed to a personal list, so nothing about you was read. This is what most people like.";

const VIEWS = {
  user_activity: "how active you have been lately",
  item_activity: "how it has been received lately",
  user_affinity: "how much you like its category",
};

/** One entry of `because` as a sentence. */
export function because(entry) {
  const people = entry.people_both ? ` — ${entry.people_both} ${entry.people_both === 1 ? "person" : "people"} had both` : "";
  switch (entry.kind) {
    case "event":
      return `You had “${entry.title ?? entry.item_id}”${people}`;
    case "wish":
      return entry.words ? `Your wish: “${entry.words}”` : "Your wish";
    case "features":
      return capital(VIEWS[entry.view] ?? entry.view ?? "what is known of you");
    case "co_visitation":
      return `People who had your last items went on to it${people}`;
    case "trending":
      return "It is popular this week";
    case "new":
      return "It is new";
    case "popular":
      return "It is liked by many";
    default:
      return capital(entry.title ?? entry.words ?? entry.view ?? String(entry.kind ?? "").replaceAll("_", " "));
  }
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** The line under a title: the one reason that tells most. */
export function shortReason(item) {
  const speaks = (item.because ?? []).find((entry) => (entry.effect ?? 0) >= 0);
  if (speaks) return because(speaks);
  return item.reasons?.length ? capital(item.reasons[0]) : "";
}

/** What somebody did, in the history. */
export function did(event) {
  const value = event.value === null || event.value === undefined ? "" : ` ${Number(event.value.toFixed(1))}`;
  return (
    {
      view: "Looked at",
      click: "Opened",
      rating: `Rated${value} of 5`,
      like: "Liked",
      purchase: "Bought",
      hide: event.value === 1 ? "Not for me" : "Hidden",
    }[event.kind] ?? capital(event.kind)
  );
}

const AGO = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const UNITS = [["year", 31536000], ["month", 2592000], ["week", 604800], ["day", 86400], ["hour", 3600], ["minute", 60]];

export function ago(instant) {
  const seconds = (new Date(instant) - Date.now()) / 1000;
  for (const [unit, size] of UNITS) if (Math.abs(seconds) >= size) return AGO.format(Math.trunc(seconds / size), unit);
  return "now";
}

export const milliseconds = (value) => (value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`);

export function variety(value) {
  if (value === 0) return "as it comes";
  if (value < 0.35) return "a little";
  return value < 0.7 ? "mixed" : value < 1 ? "wide" : "as wide as can be";
}

const SAID = { up: "Liked", down: "Not for me", hide: "Hidden" };
export const said = (kind) => SAID[kind];

/** What a fault means for whoever uses the page. */
export function fault(error) {
  if (error.status === 401) return "This key or link is not known here, or it has expired.";
  if (error.status === 403) return "Your key may not do this.";
  if (error.status === 429) return "That was a lot at once. Wait a moment, then try again.";
  if (error.status === 503) return "Nothing can answer right now. Try again in a moment.";
  return error.message;
}
