/** Watches the service: `/status` every second while the dashboard is looked at, now and then otherwise. */

import { call } from "./api.js";

const FAST_MS = 1000;
const SLOW_MS = 5000;

/** Dispatches "change" after every look. */
export class Service extends EventTarget {
  /** The last `/status`, null before the first; kept when a later look fails. */
  status = null;
  /** Why the last look failed; null if it did not. */
  error = null;
  #fast = false;
  #timer = null;
  #looking = false;

  constructor() {
    super();
    document.addEventListener("visibilitychange", () => this.#look());
    this.#look();
  }

  set fast(fast) {
    this.#fast = fast;
    this.#look();
  }

  get #refused() {
    return [401, 403].includes(this.error?.status);
  }

  async #look() {
    clearTimeout(this.#timer);
    if (this.#looking || document.hidden) return;
    this.#looking = true;
    try {
      this.status = await call("status");
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    this.#looking = false;
    this.dispatchEvent(new Event("change"));
    if (!document.hidden)
      this.#timer = setTimeout(() => this.#look(), this.#fast && !this.#refused ? FAST_MS : SLOW_MS);
  }
}

/** What the service is at, in a few words, and whether that is good: "ready", "busy", "down". */
export function summary({ status, error }) {
  if (error?.status === 401 || error?.status === 403)
    return ["ready", error.status === 401 ? "API key needed" : "Connected"];
  if (error) return ["down", error.status === 0 ? "Service not reachable" : error.message];
  const { workers, queue } = status;
  if (workers.length === 0) return ["down", "No worker is running"];
  const running = workers.reduce((sum, worker) => sum + worker.running, 0);
  const waiting = Object.values(queue).reduce((sum, jobs) => sum + jobs, 0);
  if (running + waiting === 0) return ["ready", "Ready"];
  return ["busy", `${running} running, ${waiting} waiting`];
}
