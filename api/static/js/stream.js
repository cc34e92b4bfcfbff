/**
 * Many jobs over one websocket (`WS v1/stream`), each followed without gap or repeat.
 *
 * For each job the next wanted sequence number is kept. However the socket ends (server restarted, network
 * away, reader too slow), another is opened after a pause, and every job resumed from its number.
 */

import { call, getKey } from "./api.js";

const PAUSES_MS = [200, 400, 800, 1600, 3200, 5000];
const SILENCE_MS = 30_000; // then the connection may be dead without anybody having told us
const IDLE_MS = 10_000; // a socket that follows nothing is given back
const AGAIN_MS = 1000;
const TERMINAL = new Set(["done", "failed", "cancelled", "expired"]);
const PASSING = new Set(["unavailable", "internal_error", "rate_limited"]);

export const isTerminal = (event) => TERMINAL.has(event.type);

/** Dispatches "state" when `connected` changes. */
export class JobStream extends EventTarget {
  #followed = new Map();
  #socket = null;
  #failures = 0;
  #timer = null;
  #heard = 0;
  connected = true; // until shown otherwise: nothing is said before a first failure

  constructor() {
    super();
    addEventListener("online", () => this.#retryNow());
    addEventListener("offline", () => this.reconnect());
    setInterval(() => this.#look(), 5000);
  }

  /**
   * Call `onEvent` with every event of a job from number `from` on, up to its terminal one. `onError` gets
   * the error, as the API forms them, of a job that cannot be followed.
   */
  follow(job, from, onEvent, onError) {
    this.#followed.set(job, { next: from, onEvent, onError });
    if (this.#socket?.readyState === WebSocket.OPEN) this.#resume(job);
    else this.#connect();
  }

  /** Forget all jobs and close the socket. */
  close() {
    this.#followed.clear();
    clearTimeout(this.#timer);
    this.#timer = null;
    this.reconnect();
  }

  /** Leave the connection, whatever its state; jobs are resumed on another one. */
  reconnect() {
    const socket = this.#socket;
    if (socket === null) return;
    // Not waiting for the close to be answered, which on a dead network takes minutes.
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
    this.#lost();
  }

  #connect() {
    if (this.#socket !== null || this.#timer !== null) return;
    const url = new URL("v1/stream", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, getKey() ? ["wicore", `wicore-key.${getKey()}`] : []);
    this.#socket = socket;
    this.#heard = Date.now();
    socket.onopen = () => {
      this.#setConnected(true);
      for (const job of this.#followed.keys()) this.#resume(job);
    };
    socket.onmessage = ({ data }) => {
      this.#failures = 0;
      this.#heard = Date.now();
      this.#take(JSON.parse(data));
    };
    socket.onclose = () => this.#lost();
  }

  #lost() {
    this.#socket = null;
    if (this.#followed.size === 0) return;
    this.#setConnected(false);
    // A refused handshake tells a page nothing; a plain call does, and asks for a key if one is missing.
    if (this.#failures === 1) call("v1/models").catch(() => {});
    const pause = PAUSES_MS[Math.min(this.#failures++, PAUSES_MS.length - 1)];
    this.#timer = setTimeout(() => this.#retryNow(), pause * (0.75 + Math.random() / 2));
  }

  #retryNow() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#followed.size > 0) this.#connect();
  }

  #resume(job) {
    const { next } = this.#followed.get(job);
    this.#socket.send(JSON.stringify({ type: "resume", job, from: next }));
  }

  #take(frame) {
    const followed = this.#followed.get(frame.job);
    if (followed === undefined) return;
    if (frame.type === "error") return this.#refused(frame.job, followed, frame.error);
    if (frame.seq === undefined || frame.seq < followed.next) return;
    if (frame.seq > followed.next) return this.reconnect(); // followed already, from a later number
    followed.next = frame.seq + 1;
    if (isTerminal(frame)) this.#followed.delete(frame.job);
    followed.onEvent(frame);
  }

  #refused(job, followed, error) {
    if (error.code === "conflict") return; // followed already: its events come
    if (!PASSING.has(error.code)) {
      this.#followed.delete(job);
      followed.onError(error);
      return;
    }
    setTimeout(() => {
      const open = this.#socket?.readyState === WebSocket.OPEN;
      if (open && this.#followed.get(job) === followed) this.#resume(job);
    }, AGAIN_MS);
  }

  #look() {
    if (this.#socket === null) return;
    const quiet = Date.now() - this.#heard;
    if (quiet > (this.#followed.size === 0 ? IDLE_MS : SILENCE_MS)) this.reconnect();
  }

  #setConnected(connected) {
    if (connected === this.connected) return;
    this.connected = connected;
    this.dispatchEvent(new Event("state"));
  }
}
