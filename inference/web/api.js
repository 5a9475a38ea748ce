// Talks to the function this page came from, and to nobody else. A key lives in this tab's session storage alone.

const KEPT = "larder.session";

/** A refusal or a failure in the function's own words; `status` 0: it could not be reached. */
export class Fault extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** {key} or {link: {user, purpose, token}}, or null. */
export function session() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

export function keep(found) {
  sessionStorage.setItem(KEPT, JSON.stringify(found));
}

export function drop() {
  sessionStorage.removeItem(KEPT);
}

/** What a person pasted: a key, or a personal link (/people/<id>/<purpose>?token=…); null if it is neither. */
export function understand(text) {
  const said = text.trim().replace(/^(authorization:\s*)?bearer\s+/i, "");
  const link = /\/people\/([^?#]+)\/(forget|export|consent)\?token=([\w.-]+)$/.exec(said);
  if (link) return { link: { user: decodeURIComponent(link[1]), purpose: link[2], token: link[3] } };
  return /^larder_\w+$/.test(said) ? { key: said } : null;
}

/** Takes a key or a link out of the address, where it must not stay: not on screen, not in the browser's history. */
export function fromAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  if (!said.has("key") && !said.has("link")) return { person: said.get("person") };
  history.replaceState(null, "", location.pathname + location.search);
  const found = understand(said.get("key") ?? said.get("link"));
  if (found) keep(found);
  return { person: said.get("person"), refused: !found };
}

/** One request. Gives {status, body, headers}; throws Fault for everything but success. */
export async function ask(method, path, document, options = {}) {
  const held = session();
  const headers = { accept: "application/json" };
  if (held?.key) headers.authorization = `Bearer ${held.key}`;
  else if (held?.link) path += `${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(held.link.token)}`;
  if (document !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers,
      body: document === undefined ? undefined : JSON.stringify(document),
      cache: "no-store",
      credentials: "omit",
      ...options,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, "Larder cannot be reached right now. Look at your connection, then try again.");
  }
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw new Fault(answer.status, body?.error?.message ?? `The answer was ${answer.status}.`);
  return { status: answer.status, body, headers: answer.headers };
}

export const about = (user, what) => `people/${encodeURIComponent(user)}/${what}`;

/** `server-timing` as [[step, milliseconds], …], the whole last. */
export function timings(headers) {
  return (headers.get("server-timing") ?? "").split(",").flatMap((part) => {
    const found = /^\s*([^;]+);dur=([\d.]+)/.exec(part);
    return found ? [[found[1].replaceAll("_", " "), Number(found[2])]] : [];
  });
}
