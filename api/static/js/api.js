/** The HTTP doors. Paths are relative to the page, which may lie under a proxy's prefix. */

const TIMEOUT_MS = 20_000;
const KEY = "wicore.key";

/** Tells, by "unauthorized", that a call was refused for want of a good API key. */
export const events = new EventTarget();

/** What a call failed with; `status` 0: no answer came. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }

  /** Whether the same call may succeed a little later. */
  get transient() {
    return this.status === 0 || this.status === 503;
  }
}

export const getKey = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** The JSON that a door answers. Throws ApiError. */
export async function call(path, { method = "GET", body, headers = {} } = {}) {
  const response = await reach(path, {
    method,
    headers: {
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...(getKey() ? { Authorization: `Bearer ${getKey()}` } : {}),
      ...headers,
    },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  const error = answer?.error ?? {
    message: answer?.missing?.join("; ") ?? `The service answered ${response.status}`,
  };
  if (response.status === 401) events.dispatchEvent(new Event("unauthorized"));
  throw new ApiError(response.ok ? 0 : response.status, error);
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch {
    throw new ApiError(0, { message: "The service cannot be reached" });
  }
}

/** 128 random bits; crypto.randomUUID is missing where the page does not come over HTTPS or from this machine. */
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
}
